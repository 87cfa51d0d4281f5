"""Switches of an engine between deltas of one base: equal to dense models, bit for bit, whatever is loaded in between.

The engine is a twin of vLLM's: query, key and value lie in one tensor, and so do gate and up; each of two workers has
some rows of them, some columns of the other products and all of the rest, in a dtype of the engine's own.
"""

import shutil

import pytest
import torch
from factored import factored_pair
from safetensors.torch import load_file, save_file
from tiny_causal import make_decoder
from torch import nn

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.serving.base_checkpoint import BaseCheckpoint
from dpp_lightning.serving.vllm.in_place import check_loader, overwrite

PACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
PACKED |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


class Worker(nn.Module):
    """One worker's part of a model, and a loader that takes tensors of the checkpoint."""

    def __init__(self, checkpoint, dtype, rank, workers):
        super().__init__()
        self.rank, self.workers, self.packed, self.places = rank, workers, {}, {}
        pieces = {}
        for name, tensor in checkpoint.items():
            word = next((word for word in PACKED if f".{word}." in name), None)
            packed, order = (name.replace(word, PACKED[word][0]), PACKED[word][1]) if word else (name, 0)
            pieces.setdefault(packed, {})[order] = (name, self.part(name, tensor.detach()))
        for packed, parts in pieces.items():
            parts = [parts[order] for order in sorted(parts)]
            whole = torch.cat([part for _, part in parts]) if len(parts) > 1 else parts[0][1].clone()
            self.packed[packed], start = whole.to(dtype), 0
            for name, part in parts:
                rows = len(part) if len(parts) > 1 else None
                self.places[name] = packed, start, rows
                start += rows or 0

    def part(self, name, tensor):
        if name.endswith(BY_COLUMNS):
            size = tensor.shape[1] // self.workers
            return tensor.narrow(1, self.rank * size, size)
        if any(f".{word}." in name for word in PACKED):
            size = tensor.shape[0] // self.workers
            return tensor.narrow(0, self.rank * size, size)
        return tensor

    def load_weights(self, weights):
        for name, tensor in weights:
            packed, start, rows = self.places[name]
            place = self.packed[packed]
            (place if rows is None else place[start : start + rows]).copy_(self.part(name, tensor))


class Engine:
    """All workers."""

    def __init__(self, checkpoint, dtype, workers=2):
        self.workers = [Worker(checkpoint, dtype, rank, workers) for rank in range(workers)]

    def switch(self, checkpoint, present, wanted):
        for worker in self.workers:
            check_loader(worker, {name: checkpoint.tensors[name] for name in wanted})
            overwrite(worker, checkpoint.tensors, checkpoint.new_values(present, wanted))

    def equals(self, checkpoint, dtype):
        others = Engine(checkpoint, dtype, len(self.workers)).workers
        for worker, other in zip(self.workers, others, strict=True):
            assert worker.packed.keys() == other.packed.keys()
        return all(
            torch.equal(worker.packed[name], other.packed[name])
            for worker, other in zip(self.workers, others, strict=True)
            for name in worker.packed
        )


def finetuned_of(base, seed, scale=0.02):
    model = make_decoder("qwen2", tied=base.config.tie_word_embeddings)
    model.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (scale * torch.randn(parameter.shape)).to(parameter.dtype)
    return model


def save_all(folder, base, deltas):
    """Base, deltas, and each delta's dense model as ``dpp apply`` writes it; their folders."""
    base.save_pretrained(folder / "base")
    for name, delta in deltas.items():
        delta.save_pretrained(folder / name)
        apply_checkpoint(folder / "base", folder / name, folder / f"{name}-dense")
    return folder


@pytest.fixture(scope="module", params=["float32", "float16"])
def folder(request, tmp_path_factory):
    """Deltas of a tied decoder with 9 in 10 entries dropped, and one that carries half of the model dense."""
    base = make_decoder("qwen2", tied=True).to(getattr(torch, request.param))
    deltas = {name: prune(base, finetuned_of(base, seed), "dare", 0.9, seed=seed) for seed, name in enumerate("AB")}
    deltas["C"] = prune(base, finetuned_of(base, 5), "magnitude", 0.7, scope="linear", outside="carry")
    return save_all(tmp_path_factory.mktemp("serving"), base, deltas)


def dense(folder, name):
    """A checkpoint's tensors, of tied ones those that an engine loads."""
    path = folder / ("base" if name == "base" else f"{name}-dense")
    return {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name != "lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_an_engine_holds_the_dense_model_of_every_delta_bit_for_bit_in_any_order(folder, dtype):
    checkpoint, engine = BaseCheckpoint(folder / "base"), Engine(dense(folder, "base"), dtype)
    changes = {name: checkpoint.changes(folder / name) for name in "ABC"} | {"base": {}}
    present = "base"
    for wanted in ("A", "B", "base", "C", "A", "C", "base", "B", "B", "base"):
        engine.switch(checkpoint, changes[present], changes[wanted])
        assert engine.equals(dense(folder, wanted), dtype), f"{present} to {wanted}"
        present = wanted


@pytest.mark.parametrize("rate", [0.9, 0.999])
def test_only_entries_that_change_are_written(folder, tmp_path, rate):
    """The two rates are found to overlap in different ways."""
    checkpoint, base = BaseCheckpoint(folder / "base"), make_decoder("qwen2", tied=True)
    base.load_state_dict({**base.state_dict(), **load_file(folder / "base" / "model.safetensors")})
    for seed, name in enumerate("ab"):
        prune(base, finetuned_of(base, seed), "dare", rate, seed=seed).save_pretrained(tmp_path / name)
    a, b = (checkpoint.changes(tmp_path / name) for name in "ab")
    for present, wanted in ((a, {}), ({}, a), (a, b), (b, b)):
        for name, new in checkpoint.new_values(present, wanted):
            either = [changes[name].indices for changes in (present, wanted) if name in changes]
            assert sorted(new.indices.tolist()) == sorted(set(torch.cat(either).tolist()))
            assert len(new.values) == len(new.indices)


def test_whole_tensors_are_those_of_the_dense_model(folder):
    checkpoint = BaseCheckpoint(folder / "base")
    for name in ("base", "A", "C"):
        changes = {} if name == "base" else checkpoint.changes(folder / name)
        whole, expected = dict(checkpoint.dense(changes)), dense(folder, name)
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[n], expected[n]) for n in expected)


def test_a_low_rank_delta_gives_the_dense_model(tmp_path):
    base, delta = factored_pair()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    delta.save_pretrained(tmp_path / "delta")
    checkpoint = BaseCheckpoint(tmp_path / "model.safetensors")
    changes = checkpoint.changes(tmp_path / "delta")
    engine = Engine(base.state_dict(), torch.bfloat16)
    engine.switch(checkpoint, {}, changes)
    with delta.applied(base):
        assert engine.equals(base.state_dict(), torch.bfloat16)
    engine.switch(checkpoint, changes, {})
    assert engine.equals(base.state_dict(), torch.bfloat16)


def test_a_merged_delta_is_used_as_one_of_its_tasks(tmp_path):
    base, one = factored_pair(method="dare")
    other = SparseDelta(one.tensors, {name: tensor + 1 for name, tensor in one.carried.items()}, one.info)
    merged = merge(base, {"one": one, "other": other})
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    merged.save_pretrained(tmp_path / "merged")
    checkpoint = BaseCheckpoint(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="choose one"):
        checkpoint.changes(tmp_path / "merged")
    with pytest.raises(ValueError, match="no task 'third'"):
        checkpoint.changes(tmp_path / "merged", task="third")
    engine = Engine(base.state_dict(), torch.float32)
    engine.switch(checkpoint, {}, checkpoint.changes(tmp_path / "merged", task="other"))
    merged.for_task("other").apply_(base)
    assert engine.equals(base.state_dict(), torch.float32)


def test_another_base_is_refused_unless_forced(folder, tmp_path):
    other = make_decoder("qwen2", tied=True, seed=7)
    other.save_pretrained(tmp_path / "other")
    checkpoint = BaseCheckpoint(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the base of this delta"):
        checkpoint.changes(folder / "A")
    assert checkpoint.changes(folder / "A", force=True)


def test_a_damaged_or_missing_folder_is_refused(folder, tmp_path):
    checkpoint = BaseCheckpoint(folder / "base")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "A", damaged)
    content = bytearray((damaged / "delta_model.safetensors").read_bytes())
    content[-3] ^= 1
    (damaged / "delta_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.changes(damaged)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoint.changes(tmp_path / "absent")


def test_tensors_that_the_base_lacks_are_named(folder):
    base = make_decoder("qwen2", tied=True)
    finetuned = finetuned_of(base, 3)
    state, values = base.state_dict(), finetuned.state_dict()
    values["score.weight"] = torch.randn(2, 32)
    delta = prune(state, values, "dare", 0.9, carry=["score.*"])
    delta.save_pretrained(folder / "with_a_head")
    with pytest.raises(ValueError, match=r"score\.weight: not there"):
        BaseCheckpoint(folder / "base").changes(folder / "with_a_head", force=True)


def test_a_vocabulary_that_grew_is_refused_by_name(tmp_path):
    base = make_decoder("qwen2", tied=True)
    finetuned = finetuned_of(base, 3)
    finetuned.resize_token_embeddings(base.config.vocab_size + 8)
    base.save_pretrained(tmp_path / "base")
    prune(base, finetuned, "dare", 0.9).save_pretrained(tmp_path / "grown")
    with pytest.raises(ValueError, match=r"adds rows to embed_tokens\.weight"):
        BaseCheckpoint(tmp_path / "base").changes(tmp_path / "grown")


@pytest.mark.parametrize(
    ("head", "kind"), [(torch.full((3,), float("nan")), "NaN"), (torch.tensor([1, 2, 3]), r"torch\.int64")]
)
def test_carried_values_that_an_engine_cannot_be_given_are_refused(head, kind, tmp_path):
    base = {"layers.0.weight": torch.randn(20, 20), "layers.0.head": torch.zeros(3, dtype=head.dtype)}
    delta = prune(base, {**base, "layers.0.weight": torch.randn(20, 20)}, "dare", 0.5, carry=["*head"])
    SparseDelta(delta.tensors, {"layers.0.head": head}, delta.info).save_pretrained(tmp_path / "delta")
    save_file(base, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"head: a server cannot be switched to a tensor of {kind}"):
        BaseCheckpoint(tmp_path / "model.safetensors").changes(tmp_path / "delta", force=True)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    base = {"weight": torch.randn(20, 20).half()}
    delta = prune(base, {"weight": base["weight"] + 1}, "dare", 0.5).rescaled(1e-6)
    delta.save_pretrained(tmp_path / "delta")
    save_file(base, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="weight: theta_0"):
        BaseCheckpoint(tmp_path / "model.safetensors").changes(tmp_path / "delta")
