"""Every packaged config against the real signatures: parsed, its callbacks and data built, nothing downloaded or run."""

from importlib import import_module

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import Strategy
from parse_only import parse
from torch.optim import Optimizer

from dpp_lightning.analysis.theory import LARGE_DELTA, recommend
from dpp_lightning.callbacks import DeltaPruneCallback, SparseTraining
from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.signatures import class_parser, find_class

TASKS = ("cola", "sst2", "mrpc", "stsb")
EXPECTED = {f"{encoder}_{task}_adamr.yaml" for encoder in ("bert", "roberta") for task in TASKS}
EXPECTED |= {"bert_cola_adamw.yaml", "quickstart.yaml", "qwen2_0.5b_metamath_adamr.yaml", "llama2_7b_gsm8k_prune.yaml"}
EXPECTED |= {"qwen2_0.5b_metamath_lora_adamr.yaml", "vit_cifar100_adamr.yaml", "vit_cifar100_adamw.yaml"}
EXPECTED |= {"vit_cifar10_adamr.yaml", "two_layer_cifar10_svhn.yaml"}
SPARSE = {"bert_sst2_sparse.yaml"}  # trains the entries that are kept, so that nothing is pruned after it
EXPECTED |= SPARSE
UNTRAINED = {"llama2_7b_gsm8k_prune.yaml"}
FRAGMENTS = {"ddp.yaml", "fsdp.yaml", "multi_node.yaml"}  # composed with a recipe
RECIPES = [name for name in packaged_configs.names() if name not in FRAGMENTS]
NAMED = (Callback, LightningDataModule, LightningModule, Optimizer, Strategy)  # what recipes name by class
ADAMW = [name for name in packaged_configs.names() if name.endswith("_adamw.yaml")]


def build(setting):
    """The object that a ``class_path`` with ``init_args`` stands for."""
    module, _, name = setting["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**setting.get("init_args", {}))


def differences(left, right, path=()):
    """Where two nested dicts or lists differ, as dotted paths."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return {where for key in keys for where in differences(left.get(key), right.get(key), (*path, key))}
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return {where for index, (a, b) in pairs for where in differences(a, b, (*path, str(index)))}
    return set() if left == right else {".".join(path)}


def restated_defaults(settings, defaults, path=""):
    """Keys of a config whose values are those of the signature, as dotted paths; classes are followed into."""
    restated = set()
    for key, value in settings.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "class_path" in item:
                signature = class_parser(find_class(NAMED, item["class_path"])).get_defaults().as_dict()
                settings_of_class = item.get("init_args", {})
                restated |= restated_defaults(settings_of_class, signature, f"{path}{key}.")
                if not settings_of_class and item == defaults.get(key):
                    restated.add(f"{path}{key}")
        if isinstance(value, dict) and "class_path" not in value and isinstance(defaults.get(key), dict):
            restated |= restated_defaults(value, defaults[key], f"{path}{key}.")
        elif key in defaults and defaults[key] == value:
            restated.add(f"{path}{key}")
    return restated


@pytest.fixture(scope="module")
def defaults():
    """What holds where neither config nor command line says anything."""
    return parse("fit", "--model", "VisionModule", "--data", "DigitsDataModule") | {"model": None, "data": None}


@pytest.mark.parametrize("name", packaged_configs.names())
def test_no_recipe_restates_a_default(name, defaults):
    assert restated_defaults(yaml.safe_load(packaged_configs.read(name)), defaults) == set()


def test_the_recipes_of_the_papers_are_there():
    assert set(packaged_configs.names()) >= EXPECTED | FRAGMENTS


@pytest.mark.parametrize("name", RECIPES)
def test_first_line_names_the_command(name):
    command = "test" if name in UNTRAINED else "fit"
    assert f"dpp {command} --config {name}" in packaged_configs.title(name)


@pytest.mark.parametrize("name", sorted(FRAGMENTS))
@pytest.mark.parametrize("recipe", ["bert_cola_adamr.yaml", "quickstart.yaml", "qwen2_0.5b_metamath_adamr.yaml"])
def test_fragments_change_the_trainer_alone(name, recipe):
    alone, composed = parse("fit", "--config", recipe), parse("fit", "--config", recipe, "--config", name)
    changed = differences(alone, composed)
    assert changed
    assert {keys.split(".")[1] for keys in changed} <= {"strategy", "num_nodes"}
    assert f"--config {name}" in packaged_configs.title(name)
    if name == "fsdp.yaml":
        build(composed["trainer"]["strategy"])


@pytest.mark.parametrize("name", RECIPES)
def test_parses_against_the_real_signatures(name):
    config = parse("fit", "--config", name)
    assert config["model"]["class_path"].startswith("dpp_lightning.tasks.")
    assert config["data"]["class_path"].startswith("dpp_lightning.tasks.")
    build(config["data"])
    built = [build(callback) for callback in config["trainer"]["callbacks"]]
    if not name.startswith("adamerging"):
        assert "DeltaPruneCallback" in {type(callback).__name__ for callback in built}


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in UNTRAINED | {"quickstart.yaml"}])
def test_a_recipe_that_trains_writes_last_ckpt_into_its_folder(name):
    trainer, folder = parse("fit", "--config", name)["trainer"], f"runs/{name.removesuffix('.yaml')}"
    (checkpoint,) = (c for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint"))
    settings = checkpoint["init_args"]
    assert (settings["dirpath"], settings["filename"], trainer["default_root_dir"]) == (folder, "last", folder)
    assert (settings["monitor"], settings["save_top_k"]) == (None, 1)  # the newest, whatever its score


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("adamerging") and n not in SPARSE])
def test_a_recipe_runs_the_recommended_method(name):
    callbacks = parse("fit", "--config", name)["trainer"]["callbacks"]
    (pruning,) = (c["init_args"] for c in callbacks if c["class_path"].endswith("DeltaPruneCallback"))
    advice = recommend(LARGE_DELTA / 10, can_retrain=name not in UNTRAINED)
    assert advice.method in pruning["method"]
    assert pruning["objective"] == advice.objective.replace(" ", "_")


@pytest.mark.parametrize("name", sorted(SPARSE))
def test_a_recipe_of_sparse_training_saves_the_entries_that_it_trains(name):
    built = [build(callback) for callback in parse("fit", "--config", name)["trainer"]["callbacks"]]
    sparse, prune = (next(c for c in built if isinstance(c, kind)) for kind in (SparseTraining, DeltaPruneCallback))
    assert (sparse.mask, prune.settings.methods) == ("random", ("random-drop",))
    assert (sparse.pruning_rate, sparse.seed) == (*prune.settings.rates, *prune.settings.seeds)
    assert sparse.scope == prune.settings.scope


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_twin_differs_in_the_optimizer_alone(name):
    twins = [parse("fit", "--config", config) for config in (name, name.replace("_adamw", "_adamr"))]
    changed = {keys for keys in differences(*twins) if not keys.startswith("model.init_args.optimizer")}
    assert {keys.rpartition(".")[2] for keys in changed} == {"default_root_dir", "dirpath"}


@pytest.mark.parametrize("name", ["bert_cola_adamr.yaml", "roberta_stsb_adamr.yaml"])
def test_local_folders_replace_the_hub(name):
    config = parse("fit", "--config", name, "--model.pretrained", "./encoder", "--data.path=./glue")
    assert config["model"]["init_args"]["pretrained"] == "./encoder"
    assert config["data"]["init_args"]["path"] == "./glue"
