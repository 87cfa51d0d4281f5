"""prune, SparseDelta and its folder: the formula, bit-exact revert, round trips, refusals."""

import copy
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Net, pair
from torch import nn

from dpp_lightning import METHODS, SparseDelta, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.delta.config_file import config_checksum
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.sampling.sampler import kept_positions


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(("method", "q"), [("random-drop", 1.0), ("dare", 0.1)])
def test_a_kept_entry_is_base_plus_delta_over_q(method, q):
    base, finetuned = pair()
    delta = prune(base, finetuned, method, 0.9, seed=3)
    assert delta.q == pytest.approx(q, rel=1e-15)
    before, target = state(base), state(finetuned)
    delta.apply_(base)
    for name, tensor in base.state_dict().items():
        kept = np.zeros(tensor.numel(), dtype=bool)
        kept[kept_positions(name, tensor.numel(), 0.9, 3)] = True
        expected = np.where(
            kept,
            before[name].numpy().ravel() + (target[name] - before[name]).numpy().ravel() / q,
            before[name].numpy().ravel(),
        )
        np.testing.assert_allclose(tensor.numpy().ravel(), expected, rtol=1e-6, atol=1e-7)


def test_dare_is_unbiased_over_seeds():
    base, finetuned = nn.Linear(50, 40), nn.Linear(50, 40)
    with torch.no_grad():
        finetuned.weight.copy_(base.weight + 1)
    total = torch.zeros_like(base.weight)
    for seed in range(300):
        with prune(base, finetuned, "dare", 0.9, seed=seed).applied(base):
            total += base.weight.detach()
    assert abs(float((total / 300 - base.weight).mean()) - 1) < 0.02


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]),
    seed=st.integers(0, 2**40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    values=st.sampled_from([None, "bfloat16", "float16", "float32"]),
    positions=st.sampled_from([None, "seed", "index"]),
    scope=st.sampled_from(["all", "linear"]),
)
def test_folder_round_trip_and_bit_exact_revert(tmp_path_factory, rate, seed, dtype, values, positions, scope):
    base, finetuned = pair(dtype=dtype)
    folder = tmp_path_factory.mktemp("delta") / "out"
    delta = prune(base, finetuned, "dare", rate, seed=seed, scope=scope, dtype=values)
    delta.save_pretrained(folder, positions=positions)
    back = SparseDelta.from_pretrained(folder)
    assert back.info == delta.info
    assert (back.num_kept, back.density, back.num_bytes) == (delta.num_kept, delta.density, delta.num_bytes)
    before = state(base)
    with delta.applied(base):
        applied = state(base)
    assert same(state(base), before)
    back.apply_(base)
    assert same(state(base), applied)
    back.revert_(base)
    assert same(state(base), before)
    if positions != "index":
        assert (folder / "delta_model.safetensors").stat().st_size + (
            folder / "delta_config.json"
        ).stat().st_size == delta.num_bytes


def test_rate_zero_gives_the_finetuned_model():
    base, finetuned = pair()
    with prune(base, finetuned, "darex-q", 0, calibration=Calibration(lambda d: 0.0)).applied(base):
        for a, b in zip(base.parameters(), finetuned.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_same_mask_for_module_state_dict_and_wrapped_module():
    base, finetuned = pair()
    wrapped_base, wrapped = nn.ModuleDict({"model": base}), nn.ModuleDict({"model": finetuned})
    deltas = [
        prune(base, finetuned, "dare", 0.9),
        prune(base.state_dict(), finetuned.state_dict(), "dare", 0.9),
        prune(wrapped_base, wrapped, "dare", 0.9),
        prune(
            wrapped_base.state_dict(),
            {f"model._orig_mod.{n}": t for n, t in finetuned.state_dict().items()},
            "dare",
            0.9,
        ),
    ]
    for delta in deltas[1:]:
        assert delta.tensors.keys() == deltas[0].tensors.keys()
        assert all(torch.equal(delta.tensors[n].indices, t.indices) for n, t in deltas[0].tensors.items())
        assert delta.base_fingerprint == deltas[0].base_fingerprint


def test_new_head_and_patterns_are_carried_and_outside_can_be_reverted():
    base, finetuned = pair()
    finetuned.head = nn.Linear(8, 5)
    delta = prune(base, finetuned, "dare", 0.9)
    assert set(delta.carried) == {"head.weight", "head.bias"}
    target = Net()
    target.load_state_dict(base.state_dict())
    target.head = nn.Linear(8, 5)
    delta.apply_(target)
    assert torch.equal(target.head.weight, finetuned.head.weight)
    base, finetuned = pair()
    carried = prune(base, finetuned, "dare", 0.9, carry=["head.*"])
    assert torch.equal(carried.carried["head.weight"], finetuned.head.weight)
    reverted = prune(base, finetuned, "dare", 0.9, scope="linear", outside="revert")
    assert set(reverted.tensors) == {n for n in base.state_dict() if n.startswith("layers.")}
    assert not reverted.carried
    assert "head.weight" in reverted.info.reverted


def test_tensors_that_training_left_alone_cost_nothing():
    base, finetuned = pair()
    with torch.no_grad():
        finetuned.embed.weight.copy_(base.embed.weight)
    delta = prune(base, finetuned, "dare", 0.5, exclude=["norm.*"])
    assert "embed.weight" not in delta.tensors
    assert set(delta.carried) == {"norm.weight", "norm.bias"}


def test_buffers_that_differ_are_carried_and_tied_tensors_stored_once():
    base, finetuned = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    finetuned(torch.randn(10, 4))
    with torch.no_grad():
        finetuned.weight.mul_(2)
    delta = prune(base, finetuned, "dare", 0.5)
    assert set(delta.carried) == {"running_mean", "running_var", "num_batches_tracked"}
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    other = {name: tensor + 1 for name, tensor in tied.state_dict().items() if name != "b.weight"}
    assert "b.weight" not in prune(tied, other, "dare", 0.5).tensors
    assert "b.weight" not in prune(tied.state_dict(), other, "dare", 0.5).tensors


def test_size_counts_every_byte_and_shrinks_with_the_rate():
    base, finetuned = nn.Linear(500, 400, bias=False), nn.Linear(500, 400, bias=False)
    sizes = {rate: prune(base, finetuned, "dare", rate).num_bytes for rate in (0.9, 0.99, 0.999)}
    for rate, size in sizes.items():
        assert size == pytest.approx(200_000 * (1 - rate) * 4 + 1500, rel=0.35)
    assert prune(base, finetuned, "dare", 0.9, dtype="bfloat16").num_bytes < 0.55 * sizes[0.9]


def test_rescaled_shares_the_kept_entries():
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.9)
    other = delta.rescaled(0.5)
    assert other.q == 0.5
    assert other.tensors is delta.tensors
    assert delta.q == pytest.approx(0.1)


def test_apply_twice_and_revert_without_apply_are_refused():
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.9)
    with pytest.raises(RuntimeError, match="not applied"):
        delta.revert_(base)
    delta.apply_(base)
    with pytest.raises(RuntimeError, match="already applied"):
        delta.apply_(base)


def test_revert_in_another_process_takes_the_base():
    base, finetuned = pair()
    original = state(base)
    prune(base, finetuned, "dare", 0.9).apply_(base)
    prune(original, finetuned, "dare", 0.9).revert_(base, base=original)
    assert same(state(base), original)


def test_another_base_is_refused_unless_forced_and_nothing_is_written():
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.9)
    other, _ = pair(seed=1)
    before = state(other)
    with pytest.raises(ValueError, match="not the base of this delta"):
        delta.apply_(other)
    assert same(state(other), before)
    delta.apply_(other, force=True)
    delta.revert_(other)
    assert same(state(other), before)
    with pytest.raises(ValueError, match="does not fit"):
        delta.apply_(nn.Linear(3, 3))


def test_overflow_is_refused_before_anything_is_written():
    base, finetuned = pair(dtype=torch.float16, scale=0)
    with torch.no_grad():
        finetuned.embed.weight.add_(1000)
    delta = prune(base, finetuned, "dare", 0.99)
    before = state(base)
    with pytest.raises(ValueError, match=r"not finite in torch.float16 at q=0.01"):
        delta.apply_(base)
    assert same(state(base), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dare-x"}, "did you mean"),
        ({"method": "darex-q"}, "searches q"),
        ({"pruning_rate": 1.0}, r"\[0, 1\)"),
        ({"seed": -1}, "mask seed"),
        ({"carry": ["nothing.*"]}, "matches none"),
        ({"dtype": "int5"}, "dtype"),
        ({"budget": "model"}, "unknown method setting"),
        ({"method": "magnitude", "budget": "layer"}, "budget must be one of"),
        ({"method": "importance", "dtype": "int4"}, "weighs"),
        ({"q": 0.0, "method": "darex-q"}, "finite number above 0"),
        ({"scope": "some"}, "scope must be"),
        (
            {"include": ["embed.weight"], "exclude": ["embed.*"]},
            r"no tensor is left to prune with include=\['embed.weight'\], exclude=\['embed.\*'\]: of",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    base, finetuned = pair()
    with pytest.raises(ValueError, match=message):
        prune(base, finetuned, **{"method": "dare", **arguments})


def test_weights_that_have_no_delta_are_refused():
    base, _ = pair()
    with pytest.raises(ValueError, match="meta device"):
        prune(base, Net().to("meta"), "dare")
    quantised = Net()
    quantised.gain = nn.Parameter(torch.ones((), dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"gain: dtype torch.int8"):
        prune(base, quantised, "dare")
    broken = Net()
    broken.load_state_dict(base.state_dict())
    broken.gain.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        prune(base, broken, "dare", 0.0)


def test_save_replaces_a_delta_but_nothing_else(tmp_path):
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.9)
    delta.save_pretrained(tmp_path / "d", scores={"accuracy": 0.5})
    delta.rescaled(0.5).save_pretrained(tmp_path / "d")
    assert SparseDelta.from_pretrained(tmp_path / "d").q == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not overwritten"):
        delta.save_pretrained(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    base, finetuned = pair()
    delta = prune(base, finetuned, "dare", 0.9)
    delta.save_pretrained(tmp_path / "d")
    monkeypatch.setattr("dpp_lightning.delta.folder.card_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        delta.rescaled(0.5).save_pretrained(tmp_path / "d")
    assert SparseDelta.from_pretrained(tmp_path / "d").q == pytest.approx(0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("method", "dtype"), [("dare", None), ("magnitude", "int8"), ("importance", "float16")])
def test_a_delta_in_memory_holds_none_of_its_files(tmp_path, method, dtype):
    """So that its folder can be replaced on Windows too, where no file that is mapped can be."""
    q = {"q": 0.5} if method == "importance" else {}
    folder = prune(*pair(), method, 0.5, dtype=dtype, carry=["head.*"], **q).save_pretrained(tmp_path / "d")
    reader = DeltaReader.open(folder)
    assert str(folder) in Path("/proc/self/maps").read_text()
    delta = SparseDelta.from_contents(reader.contents)
    del reader
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert delta.num_kept


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SparseDelta.from_pretrained("/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="lacks"):
        SparseDelta.from_pretrained(tmp_path)


def hostile_configs():
    def edit(**changes):
        return lambda config: {**config, **changes}

    yield "format", edit(format="zip")
    yield "newer", edit(format_version=99)
    yield "rate", edit(pruning_rate=1.5)
    yield "rate text", edit(pruning_rate="0.9")
    yield "q zero", edit(q=0)
    yield "q infinite", edit(q=float("inf"))
    yield "seed", edit(seed=-4)
    yield "seed bool", edit(seed=True)
    yield "other seed", edit(seed=77)
    yield "positions", edit(positions="bitmap")
    yield "index without stored positions", edit(positions="index")
    yield "unseeded", edit(seeded=False)


@pytest.mark.parametrize(("name", "change"), list(hostile_configs()), ids=lambda x: x if isinstance(x, str) else "")
def test_hostile_configs_give_a_value_error(name, change):
    model, config = prune(*pair(), "dare", 0.9).to_bytes()
    changed = change(json.loads(config))
    with pytest.raises(ValueError, match=r"checksum|format"):
        SparseDelta.from_bytes(model, json.dumps(changed).encode())
    changed["config_checksum"] = config_checksum(changed)
    with pytest.raises(ValueError, match=r".+"):
        SparseDelta.from_bytes(model, json.dumps(changed).encode())


def test_every_method_has_paper_and_address():
    for name, row in METHODS.items():
        assert name == name.lower()
        assert row.paper
        assert row.url.startswith("https://")


def test_the_repr_is_one_line_with_method_rate_q_and_counts(tmp_path):
    base, finetuned = pair()
    delta = prune(base, finetuned, "magnitude", 0.9, carry=["head.*"])
    shown = repr(delta)
    assert str(delta) == shown
    assert "\n" not in shown
    entries = sum(p.numel() for n, p in finetuned.named_parameters() if not n.startswith("head."))
    assert shown.startswith("SparseDelta('magnitude', pruning_rate=0.9, q=1, seed=0, ")
    assert f"{len(delta.tensors)} tensors with {delta.num_kept:,} of {entries:,} entries kept, 2 carried" in shown
    assert f"dense model {4 * sum(p.numel() for p in finetuned.parameters()):,} bytes" in shown
    delta.save_pretrained(tmp_path / "d")
    assert repr(SparseDelta.from_pretrained(tmp_path / "d")) == shown
    assert "q=0.25" in repr(delta.rescaled(0.25))
    assert repr(SparseDelta({}, {}, delta.info)).count("0 of 0 entries") == 1


def test_the_repr_encodes_nothing(monkeypatch):
    delta = prune(*pair(), "dare", 0.9)
    monkeypatch.setattr(SparseDelta, "to_bytes", lambda *_, **__: pytest.fail("encoded"))
    monkeypatch.setattr(torch.Tensor, "__repr__", lambda *_, **__: pytest.fail("shown"))
    assert "'dare'" in repr(delta)


class Parts(nn.Module):
    """Two maps and a head that is tied to an embedding which comes later."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 30, bias=False)
        self.a, self.b, self.embed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(30, 8)
        self.head.weight = self.embed.weight


def moved(model, *names):
    other = Parts()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not names or name.startswith(names):
                parameter += 0.1
    return other


def test_a_second_delta_that_changes_other_entries_of_the_target_is_refused_while_the_first_is_applied():
    base = Parts()
    first = prune(base, moved(base, "a", "b"), "dare", 0.5, carry=["b.*"])
    second = prune(base, moved(base, "b"), "dare", 0.5, carry=["b.bias"])
    before = state(base)
    first.apply_(base)
    with pytest.raises(RuntimeError, match=r"another delta is applied to the target: SparseDelta\('dare'.*revert_"):
        second.apply_(base)
    first.revert_(base)
    second.apply_(base)
    second.revert_(base)
    assert same(base.state_dict(), before)
    first.apply_(base)
    second.apply_(base, force=True)
    second.revert_(base)
    first.revert_(base)
    assert same(base.state_dict(), before)


def test_a_copy_of_an_applied_delta_is_applied_to_nothing():
    base = Parts()
    delta = prune(base, moved(base), "dare", 0.5)
    delta.apply_(base)
    for copied in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta))):
        assert not copied.is_applied
        assert all(torch.equal(copied.tensors[n].values, t.values) for n, t in delta.tensors.items())
    delta.revert_(base)


def test_a_tied_tensor_has_one_name_in_a_module_and_in_its_state_dict():
    base = Parts()
    tuned = moved(base)
    of_module, of_states = prune(base, tuned, "dare", 0.5), prune(base.state_dict(), tuned.state_dict(), "dare", 0.5)
    assert list(of_module.tensors) == list(of_states.tensors)
    assert "embed.weight" in of_module.tensors
    assert of_module.to_bytes() == of_states.to_bytes()
    of_states.apply_(base)
    of_states.revert_(base)


def test_two_parameters_on_one_memory_are_one_tensor():
    base = Parts()
    base.head.weight = nn.Parameter(base.embed.weight.data)
    tuned = moved(base)
    tuned.head.weight = nn.Parameter(tuned.embed.weight.data)
    delta = prune(base, tuned, "random-drop", 0.5)
    assert "head.weight" not in delta.tensors
    before = base.embed.weight.detach().clone()
    delta.apply_(base)
    changed = (base.head.weight.detach() != before).float().mean()
    assert 0.3 < float(changed) < 0.7
    delta.revert_(base)
    assert torch.equal(base.head.weight.detach(), before)
