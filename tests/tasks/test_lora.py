"""LoRA: adapters in the GLUE task, and the callback on their own parameters and on the merged delta."""

from pathlib import Path

import datasets
import pytest
import torch
from parse_only import parse
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_glue import bert_config, make_data, make_model, make_trainer
from torch import nn
from transformers import BertForSequenceClassification, BertModel, RobertaConfig, RobertaModel

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.lora_view import adapter_view, find_adapter
from dpp_lightning.cli import main
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.lora import LoRA
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
from dpp_lightning.tensors.names import canonical_tensors

QUERY = "encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_module(base, **lora):
    return GLUEModule("sst2", base, optimizer=lambda groups: AdamR(groups, lr=2e-2), lora=LoRA(r=2, **lora), seed=0)


def callback(tmp_path, lora, method="dare", pruning_rate=0.5, **settings):
    return DeltaPruneCallback(method, pruning_rate, lora=lora, output_dir=str(tmp_path / "out"), **settings)


def fit(module, tmp_path, *callbacks):
    """One epoch; the trainer."""
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, callbacks=list(callbacks))
    trainer.fit(module, GLUEDataModule(path=make_data(tmp_path / "data", "sst2")))
    return trainer


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@torch.no_grad()
def logits(model):
    tokens = torch.arange(2, 42).reshape(4, 10)
    model.eval()
    return (model({"input_ids": tokens}) if isinstance(model, GLUEModule) else model(input_ids=tokens).logits).clone()


def plain_model(base):
    return BertForSequenceClassification.from_pretrained(base, num_labels=2)


def test_only_adapters_and_head_are_trained_and_adamr_pulls_adapters_to_their_first_values(base, tmp_path):
    module = make_module(base)
    before = state(module)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert len(trained) == 2 * 2 * 2 + 2, "A and B of query and value in two layers, and the head"
    trainer = fit(module, tmp_path)
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained
    old, new = trainer.optimizers[0].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert "new" not in old or not old["new"]
    assert all("lora_" in names[id(p)] for p in old["params"])
    assert {names[id(p)] for p in new["params"]} == {n for n in module.new_parameter_names if n in trained}
    theta0 = {names[id(p)]: trainer.optimizers[0].state[p]["pretrained"] for p in old["params"]}
    assert all(torch.equal(tensor, before[name]) for name, tensor in theta0.items())


def test_adapters_are_a_function_of_the_seed_and_leave_the_first_outputs_alone(base):
    adapted, plain = make_module(base), GLUEModule("sst2", base, seed=0)
    assert same(state(adapted), state(make_module(base)))
    assert torch.equal(logits(adapted), logits(plain))
    assert adapted.output_layer.endswith(plain.output_layer.removeprefix("model."))


def test_a_checkpoint_knows_its_adapters(base, tmp_path):
    module = make_module(base, target_modules=["key", "dense"])
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, GLUEDataModule(path=make_data(tmp_path / "data", "sst2")))
    loaded = GLUEModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert loaded.lora == module.lora
    assert same(state(loaded), state(module))


def test_the_pruned_adapter_loads_as_an_ordinary_peft_folder(base, tmp_path):
    module = make_module(base)
    fit(module, tmp_path, callback(tmp_path, "adapter", "darex-q", apply=True))
    folder = tmp_path / "out" / "darex-q-p0.5-seed0"
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(plain_model(base), folder / "adapter")
    assert torch.equal(logits(loaded), logits(module))
    delta = SparseDelta.from_pretrained(folder)
    assert all(".lora_" in name for name in delta.tensors), "the frozen backbone is not stored"
    assert set(delta.carried) == {
        "classifier.modules_to_save.default.weight",
        "classifier.modules_to_save.default.bias",
    }


@pytest.mark.parametrize("lora", [None, "adapter"])
def test_kept_entries_of_an_adapter_are_its_values_over_q_and_the_weights_come_back(lora, base, tmp_path):
    module, pruned = make_module(base), callback(tmp_path, lora, ["dare", "magnitude"], [0.5, 0.9])
    trainer = fit(module, tmp_path, pruned)
    after = state(module)
    assert [row.method for row in pruned.results[:2]] == ["base", "fine-tuned"]
    assert trainer.validate(module, trainer.datamodule, verbose=False)[0]["val_score"] == pytest.approx(
        pruned.results[1].score
    )
    loaded = PeftModel.from_pretrained(plain_model(base), tmp_path / "out" / "dare-p0.5-seed0" / "adapter")
    tuned = dict(module.model.named_parameters())
    for name, tensor in loaded.named_parameters():
        if "lora_" in name:
            kept = tensor != 0
            assert 0 < kept.sum() < kept.numel()
            assert torch.allclose(tensor[kept], 2 * tuned[name][kept])
    assert same(after, state(module))


class Spy(DeltaPruneCallback):
    """Remembers the module as training left it."""

    def on_train_end(self, trainer, pl_module):
        self.before, self.tuned = state(pl_module), logits(pl_module)
        self.held = [s["pretrained"] for s in trainer.optimizers[0].state.values() if "pretrained" in s]
        self.theta0 = [tensor.clone() for tensor in self.held]
        pl_module.train()
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize("lora", ["adapter", "merged"])
def test_weights_and_theta0_are_bit_for_bit_as_training_left_them(lora, base, tmp_path):
    module = make_module(base, target_modules="all-linear")
    methods, folder = ["darex-q", "darex-learned"], str(tmp_path / "out")
    pruned = Spy(methods, pruning_rate=0.5, lora=lora, output_dir=folder, output_layer="last_hidden")
    fit(module, tmp_path, pruned)
    assert same(pruned.before, state(module))
    assert torch.equal(pruned.tuned, logits(module))
    assert pruned.theta0
    assert all(torch.equal(*pair) for pair in zip(pruned.theta0, pruned.held, strict=True))


def test_the_merged_delta_is_that_of_the_adapter_and_fits_the_plain_base(base, tmp_path):
    module = make_module(base)
    pruned = callback(tmp_path, "merged", "dare", [0.0, 0.5], carry=["classifier.*"], include=["*.query.weight"])
    fit(module, tmp_path, pruned)
    assert len(pruned.results) == 4
    folder = tmp_path / "out" / "dare-p0-seed0"
    delta = SparseDelta.from_pretrained(folder)
    assert {name.rpartition(".self.")[2] for name in delta.tensors} == {"query.weight"}
    layer = module.get_submodule(f"model.base_model.model.bert.{QUERY}")
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    dense = torch.zeros(product.numel())
    dense[delta.tensors[f"{QUERY}.weight"].indices.long()] = delta.tensors[f"{QUERY}.weight"].values.float()
    assert torch.allclose(dense.reshape(product.shape), product, atol=1e-6, rtol=0)
    assert not (folder / "adapter").exists()


def test_merged_at_rate_zero_gives_the_fine_tuned_logits_as_a_folder_for_transformers(base, tmp_path):
    module = make_module(base, target_modules="all-linear")
    fit(module, tmp_path, callback(tmp_path, "merged", "dare", 0.0))
    assert main(["apply", base, str(tmp_path / "out" / "dare-p0-seed0"), "--output", str(tmp_path / "dense")]) == 0
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert torch.allclose(logits(dense), logits(module), atol=1e-5)


def test_merged_and_applied_leaves_the_pruned_weights_in_the_base_layers(base, tmp_path):
    module = make_module(base)
    fit(module, tmp_path, callback(tmp_path, "merged", "dare", 0.5, apply=True))
    model = plain_model(base)
    SparseDelta.from_pretrained(tmp_path / "out" / "dare-p0.5-seed0").apply_(model)
    assert torch.equal(logits(model), logits(module))


def test_validate_of_a_checkpoint_gives_the_same_rows(base, tmp_path):
    data = GLUEDataModule(path=make_data(tmp_path / "data", "sst2"))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_module(base), data)
    path = trainer.checkpoint_callback.best_model_path
    for lora, pretrained in (("adapter", None), ("merged", None), ("adapter", base), ("merged", base)):
        pruned = callback(tmp_path / f"{lora} {pretrained is None}", lora, pretrained=pretrained)
        make_trainer(tmp_path, callbacks=[pruned]).validate(make_module(base), data, ckpt_path=path, verbose=False)
        assert [row.method for row in pruned.results] == ["base", "fine-tuned", "dare"], (lora, pretrained)
    deltas = [SparseDelta.from_pretrained(p) for p in sorted(tmp_path.glob("merged*/out/dare*"))]
    assert len({delta.base_fingerprint for delta in deltas}) == 1


def test_a_head_of_several_layers(tmp_path):
    sizes = {"vocab_size": 44, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=130)
    module = make_module(make_model(tmp_path / "roberta", cls=RobertaModel, config=config), target_modules="all-linear")
    assert module.output_layer == "model.base_model.model.classifier.modules_to_save.default.dense"
    assert module.max_length == 128
    fit(module, tmp_path, callback(tmp_path, "merged", "darex-q", output_layer="last_hidden"))
    names = SparseDelta.from_pretrained(tmp_path / "out" / "darex-q-p0.5-seed0").carried
    assert set(names) == {
        f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")
    }


def stopped(module):
    with adapter_view(module, BaseWeights.from_module(module), "merged", keep=True) as view:
        assert not any("lora_" in name for name in (*view.tensors, *canonical_tensors(module)))
        raise RuntimeError("stop")


def test_an_exception_in_the_merged_view_restores_everything(base):
    module = make_module(base)
    nn.init.normal_(module.get_submodule(f"model.base_model.model.bert.{QUERY}").lora_B["default"].weight)
    before = state(module)
    with pytest.raises(RuntimeError, match="stop"):
        stopped(module)
    assert same(before, state(module))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora.r is 0, expected a rank of at least 1"),
        ({"alpha": 0}, "lora.alpha is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"target_modules": "query"}, "expected a list of names"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_target_modules_that_are_not_there_are_refused(base):
    with pytest.raises(ValueError, match=r"\['q_proj'\].*expected names among \['dense', 'key', .*'query'"):
        make_module(base, target_modules=["query", "q_proj"])
    with pytest.raises(ValueError, match="the list is empty"):
        make_module(base, target_modules=[])
    with pytest.raises(ValueError, match=r"outside its new submodules: \['classifier'\]"):
        make_module(base, target_modules=["classifier"])


def test_what_has_no_plain_adapter_is_refused_before_training(base, tmp_path):
    with pytest.raises(ValueError, match="lora must be one of None, adapter, merged, got 'both'"):
        DeltaPruneCallback(lora="both")
    with pytest.raises(ValueError, match="GLUEModule holds no PeftModel; leave lora= out"):
        fit(GLUEModule("sst2", base, seed=0), tmp_path, callback(tmp_path, "adapter"))
    dora = get_peft_model(BertModel(bert_config()), LoraConfig(target_modules=["query"], use_dora=True))
    with pytest.raises(ValueError, match="with DoRA; expected a single one of plain LoRA"):
        find_adapter(dora)


def test_flags_reach_the_setting():
    arguments = ("--model.lora.r", "4", "--model.lora.target_modules", "all-linear")
    config = parse("fit", "--config", "bert_sst2_lora_adamr.yaml", *arguments)
    assert config["model"]["init_args"]["lora"] == {"r": 4, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
    assert Path(config["model"]["init_args"]["pretrained"]).name == "bert-base-uncased"
