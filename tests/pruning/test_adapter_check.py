"""Adapters that are not merged are refused however the model is held; merged ones, and those of both sides, are read."""

import copy

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

from dpp_lightning import prune
from dpp_lightning.cli import main

REFUSED = r"holds adapters that are not merged into its weights, \d+ tensors: .*merge_and_unload\(\)"


def resnet():
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    )


def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    )


def adapted(model, config):
    """A copy of the model in peft's wrapper, its adapters as training leaves them."""
    model = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


KINDS = {
    "lora-convolutions": (resnet, lambda: peft.LoraConfig(r=2, target_modules=["convolution"])),
    "lora": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query", "value"])),
    "dora": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query"], use_dora=True)),
    "ia3": (bert, lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[])),
    "loha": (bert, lambda: peft.LoHaConfig(r=2, target_modules=["query"])),
    "lokr": (bert, lambda: peft.LoKrConfig(r=2, target_modules=["query"])),
    "oft": (bert, lambda: peft.OFTConfig(oft_block_size=4, target_modules=["query"])),
    "vera": (bert, lambda: peft.VeraConfig(r=2, target_modules=["query"])),
    "whole-modules": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_memory_are_refused_and_merged_ones_are_read(kind):
    make, config = KINDS[kind]
    base = make()
    model = adapted(base, config())
    for finetuned in (model, model.state_dict(), torch.nn.ModuleDict({"net": model})):
        with pytest.raises(ValueError, match=f"^the fine-tuned model {REFUSED}"):
            prune(base, finetuned, "dare", 0.5)
    with pytest.raises(ValueError, match=f"^the base {REFUSED}"):
        prune(model.state_dict(), base.state_dict(), "dare", 0.5)
    delta = prune(base, model.merge_and_unload(), "dare", 0.5)
    assert delta.tensors
    assert not delta.carried


@pytest.mark.parametrize("kind", ["lora-convolutions", "lora"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "alone.bin", "alone.safetensors", "x.pt"])
def test_adapters_in_files_are_refused_before_anything_is_written(tmp_path, capsys, kind, file):
    make, config = KINDS[kind]
    base = make()
    base.save_pretrained(tmp_path / "base")
    state = adapted(base, config()).state_dict()
    (tmp_path / "tuned").mkdir()
    path = tmp_path / "tuned" / file
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    source = path.parent if "model" in file else path
    order = ["prune", str(tmp_path / "base"), str(source), "--method", "dare", "--output", str(tmp_path / "delta")]
    assert main(order) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{source} holds adapters that are not merged" in error
    assert ".lora_A.default.weight" in error
    assert "merge_and_unload()" in error
    assert not (tmp_path / "delta").exists()
    with pytest.raises(ValueError, match=REFUSED):
        prune(base, source, "dare", 0.5)


def test_adapters_of_both_sides_are_what_is_pruned(tmp_path):
    base = adapted(bert(), KINDS["lora"][1]())
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter += 0.05
    delta = prune(base, tuned, "dare", 0.5)
    assert delta.tensors
    assert all(".lora_" in name for name in delta.tensors)
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    of_files = prune(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "dare", 0.5)
    assert len(of_files.tensors) == len(delta.tensors)
