"""Every packaged config against the real signatures: parsed, its callbacks and data built, nothing downloaded or run."""

from importlib import import_module

import pytest
from parse_only import parse

from dpp_lightning.cli import packaged_configs

TASKS = ("cola", "sst2", "mrpc", "stsb")
EXPECTED = {f"{encoder}_{task}_adamr.yaml" for encoder in ("bert", "roberta") for task in TASKS}
EXPECTED |= {"bert_cola_adamw.yaml", "quickstart.yaml", "qwen2_0.5b_metamath_adamr.yaml", "llama2_7b_gsm8k_prune.yaml"}
EXPECTED |= {"qwen2_0.5b_metamath_lora_adamr.yaml", "vit_cifar100_adamr.yaml", "vit_cifar100_adamw.yaml"}
EXPECTED |= {"vit_cifar10_adamr.yaml", "two_layer_cifar10_svhn.yaml"}
UNTRAINED = {"llama2_7b_gsm8k_prune.yaml"}
FRAGMENTS = {"ddp.yaml", "fsdp.yaml", "multi_node.yaml"}  # composed with a recipe
RECIPES = [name for name in packaged_configs.names() if name not in FRAGMENTS]
ADAMW = [name for name in packaged_configs.names() if name.endswith("_adamw.yaml")]


def build(setting):
    """The object that a ``class_path`` with ``init_args`` stands for."""
    module, _, name = setting["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**setting.get("init_args", {}))


def differences(left, right, path=()):
    """Where two nested dicts or lists differ, as dotted paths."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return {found for key in keys for found in differences(left.get(key), right.get(key), (*path, key))}
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return {found for index, (a, b) in pairs for found in differences(a, b, (*path, str(index)))}
    return set() if left == right else {".".join(path)}


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
    places = differences(alone, composed)
    assert places
    assert {place.split(".")[1] for place in places} <= {"strategy", "devices", "num_nodes"}
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


@pytest.mark.parametrize("name", ADAMW)
def test_adamw_twin_differs_in_the_optimizer_alone(name):
    twins = [parse("fit", "--config", config) for config in (name, name.replace("_adamw", "_adamr"))]
    places = {place for place in differences(*twins) if not place.startswith("model.init_args.optimizer")}
    assert {place for place in places if not place.endswith(("output_dir", "root_dir"))} == set()


@pytest.mark.parametrize("name", ["bert_cola_adamr.yaml", "roberta_stsb_adamr.yaml"])
def test_local_folders_replace_the_hub(name):
    config = parse("fit", "--config", name, "--model.pretrained", "./encoder", "--data.path=./glue")
    assert config["model"]["init_args"]["pretrained"] == "./encoder"
    assert config["data"]["init_args"]["path"] == "./glue"
