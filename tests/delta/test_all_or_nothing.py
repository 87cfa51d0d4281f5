"""apply_, revert_ and applied() are all or nothing: interrupted at every line, and by tensors that cannot be written."""

import copy
import threading
from functools import cache

import pytest
import torch
from interrupted import at_every_line
from torch import nn

import dpp_lightning.delta.target as target_module
from dpp_lightning import prune
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.tensors.factors import Factors


class Model(nn.Module):
    """A vocabulary that grew, tied to the output; a map with factors; a head that is carried; a buffer."""

    def __init__(self, words=7):
        super().__init__()
        self.embed, self.map, self.head = nn.Embedding(words, 3), nn.Linear(3, 4, bias=False), nn.Linear(3, 2)
        self.output = nn.Linear(3, words, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


@cache
def case():
    """Base with room for the grown vocabulary, and the delta."""
    torch.manual_seed(0)
    base, finetuned = Model(words=5), Model()
    finetuned.seen += 3
    delta = prune(base, finetuned, "magnitude", 0.5, carry=["head.*"])
    factors = Factors(torch.randn(4, 1), torch.randn(1, 3))
    kept = delta.tensors["map.weight"]
    tensors = {**delta.tensors, "map.weight": SparseTensor(kept.shape, kept.indices, kept.values, factors)}
    target = Model()
    with torch.no_grad():
        target.embed.weight[:5].copy_(base.embed.weight)
        target.map.weight.copy_(base.map.weight)
    return target, delta.with_changes(tensors)


def fresh():
    target, delta = case()
    return copy.deepcopy(target), delta.with_changes()


def bits(model):
    return {name: tensor.detach().clone().contiguous().view(torch.uint8) for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@cache
def both():
    """Bits of the base and of the base with the delta."""
    target, delta = fresh()
    base = bits(target)
    delta.apply_(target, force=True)
    return base, bits(target)


def check_whole(target, delta):
    """Base or applied, what the delta says, and then the other and back, bit for bit."""
    base, applied = both()
    assert same(bits(target), applied if delta.is_applied else base)
    if delta.is_applied:
        delta.revert_(target)
        assert same(bits(target), base)
    delta.apply_(target, force=True)
    assert same(bits(target), applied)
    delta.revert_(target)
    assert same(bits(target), base)
    assert not delta.is_applied


def test_the_case_has_all_kinds_of_tensors():
    target, delta = fresh()
    assert set(delta.carried) == {"head.weight", "head.bias", "seen"}
    assert set(delta.tensors) == {"embed.weight", "map.weight"}
    assert set(delta.new_rows) == {"embed.weight"}
    assert target.output.weight is target.embed.weight
    base, applied = both()
    assert not any(torch.equal(base[name], applied[name]) for name in base)


def applied():
    target, delta = fresh()
    delta.apply_(target, force=True)
    return target, delta


def test_apply_interrupted_at_every_line_leaves_the_base():
    at_every_line(fresh, lambda target, delta: delta.apply_(target, force=True), check_whole, more_than=200)


def test_revert_interrupted_at_every_line_can_be_repeated():
    at_every_line(applied, lambda target, delta: delta.revert_(target), check_whole, more_than=100)


def use(target, delta):
    with delta.applied(target, force=True):
        pass


def test_applied_interrupted_at_every_line_leaves_the_base():
    def check(target, delta):
        assert not delta.is_applied
        check_whole(target, delta)

    at_every_line(fresh, use, check, more_than=400)


@pytest.mark.parametrize("operation", ["apply", "revert"])
@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("function", ["scatter_entries", "_rewrite_first"])
def test_an_error_at_any_tensor_undoes_the_others(monkeypatch, operation, failing, function):
    target, delta = fresh()
    if operation == "revert":
        delta.apply_(target, force=True)
    calls, real = [], getattr(target_module, function)

    def failing_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing + 1:
            raise RuntimeError("no memory is left")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target_module, function, failing_once)
        with pytest.raises((RuntimeError, ValueError), match=r"no memory|cannot be overwritten"):
            delta.apply_(target, force=True) if operation == "apply" else delta.revert_(target)
    assert delta.is_applied == (operation == "revert")
    check_whole(target, delta)


def test_an_error_in_one_of_several_threads_undoes_what_the_others_wrote(monkeypatch):
    torch.manual_seed(2)
    base = {name: torch.randn(400, 400) for name in "abcd"}
    delta = prune(base, {name: tensor + 1 for name, tensor in base.items()}, "magnitude", 0.3)
    before, real, threads = (
        {name: tensor.clone() for name, tensor in base.items()},
        target_module.scatter_entries,
        set(),
    )

    def failing(tensor, indices, values):
        threads.add(threading.get_ident())
        if tensor is base["a"] and len(threads) < 3 and len(indices) > 1:
            raise RuntimeError("no memory is left")
        real(tensor, indices, values)

    workers = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(target_module, "scatter_entries", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                delta.apply_(base)
        assert delta.is_applied or same(base, before)
        if delta.is_applied:
            delta.revert_(base)
    finally:
        torch.set_num_threads(workers)
    assert same(base, before)


def test_a_failed_undo_can_still_be_reverted(monkeypatch):
    target, delta = fresh()
    real = target_module.scatter_entries

    def failing_at_the_map(tensor, indices, values):
        if tensor is target.map.weight and len(indices) > 1:
            raise RuntimeError("no memory is left")
        real(tensor, indices, values)

    with monkeypatch.context() as patch:
        patch.setattr(target_module, "scatter_entries", failing_at_the_map)
        with pytest.raises(RuntimeError, match="no memory"):
            delta.apply_(target, force=True)
    assert delta.is_applied
    delta.revert_(target)
    assert same(bits(target), both()[0])


@pytest.mark.parametrize("last", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_cannot_be_written_is_refused_before_anything_is(last):
    base, finetuned = ({name: torch.randn(9, 4) for name in "abc"} for _ in range(2))
    delta = prune(base, finetuned, "magnitude", 0.5)
    target = {**base, "c": base["c"].to(last)}
    before = {name: tensor.float() for name, tensor in target.items()}
    with pytest.raises(ValueError, match=r"c: entries of a tensor of torch.float8.*nothing was written"):
        delta.apply_(target, force=True)
    assert same({name: tensor.float() for name, tensor in target.items()}, before)
    assert not delta.is_applied


def test_tensors_of_inference_mode_are_refused_before_anything_is_written():
    base, finetuned = ({name: torch.randn(9, 4) for name in "abc"} for _ in range(2))
    delta = prune(base, finetuned, "magnitude", 0.5)
    with torch.inference_mode():
        target = {**base, "c": base["c"].clone()}
    before = {name: tensor.clone() for name, tensor in target.items()}
    with pytest.raises(ValueError, match=r"c: .*made in inference mode"):
        delta.apply_(target)
    assert same(target, before)
    with torch.inference_mode():
        delta.apply_(target)
        delta.revert_(target)
    assert same(target, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_while_applied_is_reverted_to_the_base_in_its_dtype(dtype):
    target, delta = fresh()
    expected = bits(copy.deepcopy(target).to(dtype))
    delta.apply_(target, force=True)
    target.to(dtype)
    delta.revert_(target)
    assert same(bits(target), expected)


def test_a_model_cast_to_what_cannot_be_written_can_be_reverted_later():
    target, delta = fresh()
    delta.apply_(target, force=True)
    applied = target.map.weight.data
    target.map.weight.data = applied.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="cannot be overwritten"):
        delta.revert_(target)
    assert delta.is_applied
    target.map.weight.data = applied
    delta.revert_(target)
    assert same(bits(target), both()[0])


@pytest.mark.parametrize("layout", ["transposed", "strided", "shared"])
def test_tensors_that_are_not_contiguous_or_share_memory_come_back_bit_for_bit(layout):
    torch.manual_seed(1)
    base, finetuned = ({name: torch.randn(6, 6) for name in "ab"} for _ in range(2))
    if layout == "transposed":
        base["a"] = base["a"].t()
    if layout == "strided":
        base["a"] = torch.randn(12, 12)[::2, ::2]
    if layout == "shared":
        memory = torch.randn(7, 6)
        base = {"a": memory[:6], "b": memory[1:]}
    delta = prune(base, finetuned, "magnitude", 0.5)
    before = {name: tensor.clone() for name, tensor in base.items()}
    with delta.applied(base):
        assert not same(base, before)
    assert same(base, before)


def test_an_applied_model_that_is_gone_takes_its_values_with_it():
    target, delta = fresh()
    delta.apply_(target, force=True)
    assert delta.is_applied
    del target
    assert not delta.is_applied


def test_two_models_at_once_are_kept_apart():
    (one, delta), (other, _) = fresh(), fresh()
    base, applied = both()
    delta.apply_(one, force=True)
    with delta.applied(other, force=True):
        delta.revert_(one)
        assert same(bits(one), base)
        assert same(bits(other), applied)
    assert same(bits(other), base)
    assert not delta.is_applied
    delta.apply_(one, force=True)
    with pytest.raises(RuntimeError, match="already applied"), delta.applied(one, force=True):
        pass
    assert same(bits(one), applied)
