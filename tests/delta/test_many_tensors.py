"""Deltas of many tiny tensors: what a writer writes is within the bounds that a reader sets by the file's bytes.

The bounds begin at some thousand tensors; here at a few dozen, so that the models are tiny.
"""

import json

import pytest
import torch
import zstandard
from safetensors.torch import load, save_file

from dpp_lightning import SparseDelta, prune
from dpp_lightning.cli import main
from dpp_lightning.delta.coding import limits
from dpp_lightning.delta.table_blob import TensorTable, read_table, write_table


@pytest.fixture
def few_are_free(monkeypatch):
    monkeypatch.setattr(limits, "_FREE_BLOCKS", 64)
    monkeypatch.setattr(limits, "_FREE_TENSORS", 16)


def models(tensors, shape):
    base = {f"layers.{i}.w": torch.zeros(shape) for i in range(tensors)}
    changes = torch.randn(tensors, *shape, generator=torch.Generator().manual_seed(0))
    return base, {name: changes[i] for i, name in enumerate(base)}


def same(delta, other):
    assert delta.tensors.keys() == other.tensors.keys()
    for name, tensor in delta.tensors.items():
        assert torch.equal(other.tensors[name].indices.long(), tensor.indices.long())
        assert torch.equal(other.tensors[name].values, tensor.values)


@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_positions_are_stored_where_a_seed_would_be_asked_for_too_much(tmp_path, few_are_free, dtype):
    base, finetuned = models(200, (4,))
    delta = prune(base, finetuned, "dare", 0.99, dtype=dtype)
    model, config = delta.to_bytes()
    assert json.loads(config)["positions"] == "index"
    assert (model, config) == delta.to_bytes(positions="index")
    same(delta, SparseDelta.from_bytes(model, config))
    with pytest.raises(ValueError, match=r"a seed that draws from 200 blocks .* give positions='index'"):
        delta.to_bytes(positions="seed")
    with pytest.raises(ValueError, match="give positions='index'"):
        delta.save_pretrained(tmp_path / "delta", positions="seed")
    assert not (tmp_path / "delta").exists()


def test_a_seed_is_taken_where_there_are_bytes_enough_for_as_many_tensors(few_are_free):
    base, finetuned = models(200, (16,))
    delta = prune(base, finetuned, "dare", 0.5)
    model, config = delta.to_bytes()
    assert json.loads(config)["positions"] == "seed"
    assert (model, config) == delta.to_bytes(positions="seed")
    same(delta, SparseDelta.from_bytes(model, config))


@pytest.mark.parametrize(("tensors", "shape", "method"), [(400, (4,), "dare"), (400, (4, 4), "magnitude")])
def test_the_command_writes_a_folder_that_is_read(tmp_path, few_are_free, tensors, shape, method):
    for name, model in zip(("base", "tuned"), models(tensors, shape), strict=True):
        save_file(model, tmp_path / f"{name}.safetensors")
    sources = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    order = ["prune", *sources, "--method", method, "--pruning_rate", "0.99", "--output", str(tmp_path / "delta")]
    assert main(order) == 0
    delta = SparseDelta.from_pretrained(tmp_path / "delta")
    assert len(delta.tensors) == tensors
    same(prune(*sources, method, 0.99), delta)


def test_a_table_of_ordinary_size_is_compressed_as_ever():
    table = load(prune(*models(300, (4, 4)), "magnitude", 0.99).to_bytes()[0])["table"].numpy().tobytes()
    assert table == write_table(read_table(table))


@pytest.mark.parametrize("tensors", [0, 1, 1_000, 20_000])
def test_a_table_has_as_many_bytes_as_are_asked_for(tensors):
    """Up to 8 for each tensor, and even if nothing is to be compressed it is one frame that any reader takes."""
    table = TensorTable([(str(i), (1,)) for i in range(tensors)], [None] * tensors)
    shortest = len(write_table(table))
    for at_least in range(0, 8 * tensors + 1, 4 * tensors or 1):
        blob = write_table(table, at_least)
        assert len(blob) >= max(at_least, shortest)
        assert read_table(blob) == table
        assert zstandard.frame_content_size(blob) == len(zstandard.decompress(blob))
