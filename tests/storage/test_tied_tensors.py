"""Tied tensors in files: one tensor, one mask and one name, wherever a file holds a copy."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dpp_lightning import prune
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.storage.checkpoints import load_tensors

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=40)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
}


def save(model, folder, *, copies):
    """A model's folder; with ``copies`` each tied tensor is stored under all of its names."""
    model.save_pretrained(folder)
    tensors, state = load_file(folder / "model.safetensors"), model.state_dict()
    if copies:
        by_memory = {state[name].data_ptr(): tensor for name, tensor in tensors.items()}
        tensors |= {name: by_memory[t.data_ptr()].clone() for name, t in state.items() if name not in tensors}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return set(tensors)


@pytest.mark.parametrize("name", MODELS)
def test_copies_on_either_side_change_nothing(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    keys = save(model, tmp_path / "base", copies=False)
    assert keys < save(model, tmp_path / "base-copies", copies=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save(model, tmp_path / "tuned", copies=False)
    save(model, tmp_path / "tuned-copies", copies=True)
    expected = prune(tmp_path / "base", tmp_path / "tuned", "dare", 0.5)
    for base in ("base", "base-copies"):
        for tuned in ("tuned", "tuned-copies"):
            delta = prune(tmp_path / base, tmp_path / tuned, "dare", 0.5)
            assert delta.to_bytes()[0] == expected.to_bytes()[0]
            assert delta.info.entries == expected.info.entries
            delta.save_pretrained(tmp_path / "delta")
            apply_checkpoint(tmp_path / base, tmp_path / "delta", tmp_path / "dense")
            assert set(load_tensors(tmp_path / "dense")) == keys
            shutil.rmtree(tmp_path / "dense")


def test_what_is_not_tied_stays_two_tensors(tmp_path):
    torch.manual_seed(0)
    model = MODELS["qwen2"]()
    keys = save(model, tmp_path, copies=True)
    assert len({t.data_ptr() for t in load_tensors(tmp_path).values()}) == len(keys) - 1
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))  # equal, yet apart
    assert len({t.data_ptr() for t in load_tensors(tmp_path).values()}) == len(keys)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors["lm_head.weight"][39, 3] += 1  # tied, says the configuration, but the values do not
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len({t.data_ptr() for t in load_tensors(tmp_path).values()}) == len(keys)


def test_ties_of_a_class_that_transformers_does_not_have(tmp_path):
    save(MODELS["qwen2"](), tmp_path, copies=True)
    names = len(load_tensors(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "of-my-own", "architectures": ["Mine"]}')
    assert len({t.data_ptr() for t in load_tensors(tmp_path).values()}) == names - 1
    (tmp_path / "config.json").write_text('{"model_type": "of-my-own", "tie_word_embeddings": false}')
    assert len({t.data_ptr() for t in load_tensors(tmp_path).values()}) == names


def test_of_several_sets_of_weights_the_one_that_transformers_loads_is_read(tmp_path):
    model = MODELS["qwen2"]()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    model.save_pretrained(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.save({n: t + 2 for n, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    read, loaded = load_tensors(tmp_path), Qwen2ForCausalLM.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert name not in read or torch.equal(read[name], tensor)
    assert torch.equal(read["model.norm.weight"], tensors["model.norm.weight"] + 1)
