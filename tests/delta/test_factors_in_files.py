"""Deltas with factors: written and read as they are, applied and taken off bit for bit, in memory and from files."""

from dataclasses import replace

import pytest
import torch
from factored import factored_pair
from safetensors.torch import load, save_file
from tiny import pair

from dpp_lightning import SparseDelta
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.folder import set_q
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tensors.dtypes import DTYPES
from dpp_lightning.tensors.factors import Factors
from dpp_lightning.tensors.names import canonical_tensors

KINDS = {
    "ranked": {"method": "magnitude"},
    "seeded": {"method": "dare", "drawn_rate": 0.8, "dtype": "bfloat16"},
    "a drawn rest": {"method": "dare", "drawn_rate": 0.8, "rest": True, "dtype": "int2", "factors_dtype": "int3"},
    "integers": {"method": "magnitude", "dtype": "int8", "factors_dtype": "int4"},
}


def same(a, b):
    assert list(a.tensors) == list(b.tensors)
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        assert torch.equal(tensor.indices.long(), other.indices.long())
        assert torch.equal(tensor.values, other.values)
        assert (tensor.factors is None) == (other.factors is None)
        if tensor.factors is not None:
            assert torch.equal(tensor.factors.left, other.factors.left)
            assert torch.equal(tensor.factors.right, other.factors.right)
    assert a.info == b.info


@pytest.mark.parametrize("factors_dtype", [None, *DTYPES])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_written(kind, factors_dtype):
    _, delta = factored_pair(**{**KINDS[kind], "factors_dtype": factors_dtype})
    for positions in ("seed", "index") if delta.info.seeded else ("index",):
        files = delta.to_bytes(positions=positions)
        back = SparseDelta.from_bytes(*files)
        same(back, delta)
        assert back.to_bytes(positions=positions) == files


def test_factors_take_the_bytes_of_their_numbers_and_no_positions():
    """int4 of gaussian numbers: below 4 bits each, and 16 bits for every 32 of them."""
    torch.manual_seed(0)
    shape, rank = (600, 500), 8
    _, delta = factored_pair(factors_dtype="int4")
    numbers = Factors(torch.randn(600, rank), torch.randn(rank, 500)).rounded("int4")
    empty = torch.empty(0, dtype=torch.int32)
    tensors = {"w": SparseTensor(shape, empty, torch.empty(0), numbers)}
    model, _ = SparseDelta(tensors, {}, replace(delta.info, entries=600 * 500)).to_bytes()
    blob = load(model)["factors"].numel()
    assert 3.6 < 8 * blob / numbers.numbers < 4.3


def test_a_delta_without_factors_has_no_blob_of_them():
    _, delta = factored_pair(drawn_rate=None)
    assert "factors" in load(delta.to_bytes()[0])
    plain = SparseDelta(
        {n: SparseTensor(t.shape, t.indices, t.values) for n, t in delta.tensors.items()}, {}, delta.info
    )
    assert sorted(load(plain.to_bytes()[0])) == ["kept", "table"]


@pytest.mark.parametrize("kind", KINDS)
def test_applied_and_taken_off_bit_for_bit(kind):
    base, delta = factored_pair(**KINDS[kind])
    before = {n: t.detach().clone() for n, t in canonical_tensors(base).items()}
    delta.apply_(base)
    for name, tensor in delta.tensors.items():
        expected = before[name] + tensor.dense(delta.q).view_as(before[name])
        assert torch.allclose(canonical_tensors(base)[name], expected, atol=1e-7)
    changed = {n: t.detach().clone() for n, t in canonical_tensors(base).items()}
    delta.revert_(base)
    assert all(torch.equal(t, before[n]) for n, t in canonical_tensors(base).items())
    delta.apply_(base)
    fresh, _ = factored_pair(**KINDS[kind])
    SparseDelta.from_bytes(*delta.to_bytes()).revert_(base, base=fresh)
    assert all(torch.equal(t, before[n]) for n, t in canonical_tensors(base).items())
    for entries in delta.to_absolute(base):
        assert torch.equal(changed[entries.name].reshape(-1)[entries.indices], entries.values)


@pytest.mark.parametrize("kind", KINDS)
def test_files_and_modules_are_changed_alike(tmp_path, kind):
    base, delta = factored_pair(**KINDS[kind])
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    delta.save_pretrained(tmp_path / "delta")
    apply_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "dense")
    delta.apply_(base)
    dense = load_tensors(tmp_path / "dense")
    for name, tensor in base.state_dict().items():
        assert torch.equal(dense[name], tensor), name


def test_another_base_is_refused_by_entries_beneath_a_product_too():
    base, delta = factored_pair()
    with torch.no_grad():
        base.layers[0][0].bias[3] += 1
    with pytest.raises(ValueError, match="base"):
        delta.apply_(base)
    other, _ = pair(seed=9)
    with pytest.raises(ValueError, match="base"):
        delta.apply_(other)


def test_q_divides_kept_entries_and_leaves_factors_alone(tmp_path):
    _, delta = factored_pair()
    folder = delta.save_pretrained(tmp_path / "delta")
    set_q(folder, 0.25)
    for changed in (delta.rescaled(0.25), SparseDelta.from_pretrained(folder)):
        for name, tensor in changed.tensors.items():
            product = 0 if tensor.factors is None else tensor.factors.product()
            kept = SparseTensor(tensor.shape, tensor.indices, delta.tensors[name].values).dense(0.25)
            assert torch.allclose(tensor.dense(0.25), (kept.reshape(-1) + product).view(tensor.shape), atol=1e-6)


def test_the_dtype_of_kept_values_leaves_that_of_factors(tmp_path):
    _, delta = factored_pair(factors_dtype="int8")
    back = SparseDelta.from_pretrained(delta.save_pretrained(tmp_path / "delta", dtype="bfloat16"))
    assert (back.info.dtype, back.info.factors_dtype) == ("bfloat16", "int8")
    for name, tensor in delta.tensors.items():
        assert torch.equal(back.tensors[name].values, tensor.values.bfloat16())
        if tensor.factors is not None:
            assert torch.equal(back.tensors[name].factors.product(), tensor.factors.product())


def test_a_seed_draws_nothing_beside_factors():
    _, delta = factored_pair("dare", drawn_rate=0.8)
    name = "layers.0.0.weight"
    beside = SparseTensor((33, 8), torch.tensor([3]), torch.ones(1), delta.tensors[name].factors)
    with pytest.raises(ValueError, match=r"layers.0.0.weight has kept entries beside factors.*positions='index'"):
        SparseDelta({**delta.tensors, name: beside}, {}, delta.info).to_bytes()


@pytest.mark.parametrize("positions", ["seed", "index"])
@pytest.mark.parametrize("ranks", [(0, 0), (0, 3)])
def test_factors_of_rank_0_add_nothing_and_are_read_as_they_are(ranks, positions):
    """What a budget leaves to some maps; the base is checked at all of their entries."""
    base, delta = factored_pair("dare")
    empty, tensors = torch.empty(0, dtype=torch.int32), dict(delta.tensors)
    for name, rank in zip(("layers.0.0.weight", "layers.1.0.weight"), ranks, strict=True):
        factors = Factors(torch.ones(33, rank), torch.ones(rank, 8))
        tensors[name] = SparseTensor((33, 8), empty, torch.empty(0), factors)
    changed = SparseDelta(tensors, {}, delta.info)
    back = SparseDelta.from_bytes(*changed.to_bytes(positions=positions))
    same(back, changed)
    before = base.layers[0][0].weight.detach().clone()
    back.apply_(base)
    assert torch.equal(base.layers[0][0].weight, before)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (Factors(torch.ones(33, 9), torch.ones(9, 8)), "rank 9, where 0 to 8"),
        (Factors(torch.ones(32, 2), torch.ones(2, 8)), "32 × 8"),
        (Factors(torch.full((33, 2), torch.inf), torch.ones(2, 8)), "not finite"),
    ],
)
def test_factors_that_no_reader_takes_are_not_written(factors, message):
    _, delta = factored_pair()
    empty = torch.empty(0, dtype=torch.int32)
    tensors = {"layers.0.0.weight": SparseTensor((33, 8), empty, torch.empty(0), factors)}
    with pytest.raises(ValueError, match=message):
        SparseDelta(tensors, {}, delta.info).to_bytes()
