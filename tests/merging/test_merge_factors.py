"""Merging deltas with factors: the sum of the dense deltas, with products side by side, and what cannot be merged so."""

import pytest
import torch
from factored import factored_pair
from safetensors.torch import save_file
from tiny import pair

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.merging.products import sum_of_products
from dpp_lightning.merging.sources import MergeSource
from dpp_lightning.merging.trained_weights import MergedTensors
from dpp_lightning.tensors.factors import Factors
from dpp_lightning.tensors.names import canonical_tensors


def three():
    """Deltas of one base: kept entries beside factors, factors of a seeded selection, and no factors at all."""
    base, ranked = factored_pair("magnitude", factors_dtype="int4")
    _, seeded = factored_pair("dare", drawn_rate=0.8, rank=3)
    tuned, _ = factored_pair()
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return base, {"a": ranked, "b": seeded, "c": prune(base, tuned, "dare", 0.5, carry=["head.*"])}


@pytest.mark.parametrize("weights", [[1.0, -0.5, 0.3], 0.4])
def test_task_arithmetic_is_the_sum_of_the_dense_deltas(weights):
    base, deltas = three()
    merged = merge(base, deltas, "task-arithmetic", weights, scale=0.9)
    listed = weights if isinstance(weights, list) else [weights] * 3
    for name, tensor in merged.tensors.items():
        expected = 0.9 * sum(w * d.tensors[name].dense(d.q) for w, d in zip(listed, deltas.values(), strict=True))
        assert torch.allclose(tensor.dense(merged.q), expected, rtol=1e-5, atol=1e-7), name
    assert merged.tensors["layers.0.0.weight"].factors.rank == 5
    assert merged.tensors["layers.0.0.bias"].factors.is_whole
    assert merged.tensors["embed.weight"].factors is None


def test_the_rate_of_a_merge_counts_the_numbers_of_factors():
    base, deltas = three()
    merged = merge(base, {"a": deltas["a"]})
    entries = sum(torch.Size(tensor.shape).numel() for tensor in merged.tensors.values())
    assert merged.num_factor_numbers == 4 * 2 * (33 + 8) + 2 * (33 + 8)
    stored = merged.num_kept + merged.num_factor_numbers
    assert merged.pruning_rate == pytest.approx(1 - stored / entries, abs=1e-5)


def test_a_merge_of_folders_is_that_in_memory_and_applies_to_its_base_alone(tmp_path):
    base, deltas = three()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    for task, delta in deltas.items():
        delta.save_pretrained(tmp_path / task)
    folder = merge_checkpoints(tmp_path / "base", [tmp_path / task for task in deltas], tmp_path / "merged")
    merged, in_memory = SparseDelta.from_pretrained(folder), merge(base, deltas)
    for name, tensor in in_memory.tensors.items():
        assert torch.equal(merged.tensors[name].dense(1.0), tensor.dense(1.0))
    assert merged.info.base_check == in_memory.info.base_check
    before = {n: t.detach().clone() for n, t in canonical_tensors(base).items()}
    merged = merged.for_task("a")
    merged.apply_(base)
    assert not torch.equal(canonical_tensors(base)["layers.0.0.weight"], before["layers.0.0.weight"])
    merged.revert_(base)
    assert all(torch.equal(t, before[n]) for n, t in canonical_tensors(base).items())
    with torch.no_grad():
        base.layers[1][0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="base"):
        merged.apply_(base)
    with pytest.raises(ValueError, match="not pruned against the base"):
        merge(base, deltas)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 7), ("int2", 1 / 2)])
def test_the_dtype_of_a_merge_holds_for_factors(tmp_path, dtype, error):
    base, deltas = three()
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    (tmp_path / "base/config.json").write_text("{}")
    deltas["a"].save_pretrained(tmp_path / "a")
    exact, merged = (
        merge(base, {"a": deltas["a"]}, weights=0.7),
        merge(base, {"a": deltas["a"]}, weights=0.7, dtype=dtype),
    )
    folder = merge_checkpoints(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged", weights=0.7, dtype=dtype)
    read = SparseDelta.from_pretrained(folder)
    assert read.info.factors_dtype == dtype
    assert read.num_bytes < exact.num_bytes
    for name, tensor in merged.tensors.items():
        assert torch.equal(read.tensors[name].dense(1.0), tensor.dense(1.0)), name
        if tensor.factors is not None:
            for stored, wanted in zip(tensor.factors.stored(), exact.tensors[name].factors.stored(), strict=True):
                assert (stored - wanted).abs().max() <= error * wanted.abs().max()


def test_ties_refuses_factors_and_names_the_cure():
    base, deltas = three()
    with pytest.raises(ValueError, match=r"ties goes by kept entries, and a, b hold factors: .*task-arithmetic"):
        merge(base, deltas, "ties")


def test_positions_follow_from_one_seed_only_where_the_rates_of_the_draw_are_one():
    base, _ = factored_pair()
    tuned, _ = factored_pair()
    with torch.no_grad():
        tuned.embed.weight += 0.01
        tuned.norm.weight += 0.01
    first = prune(base, tuned, "dare", 0.8)
    other = prune(base, tuned, "dare", 0.7)
    other = SparseDelta(
        other.tensors, {}, other.info.__class__(**{**vars(other.info), "pruning_rate": 0.8, "drawn_rate": 0.7})
    )
    same = merge(base, {"a": other, "b": other})
    assert (same.info.seeded, same.info.drawn_rate) == (True, 0.7)
    assert SparseDelta.from_bytes(*same.to_bytes()).info == same.info
    assert not merge(base, {"a": first, "b": other}).info.seeded


@pytest.mark.parametrize(("shape", "ranks"), [((4, 6), (3, 3)), ((6, 4), (3, 3)), ((3, 2, 2), (2, 2)), ((5,), (1, 1))])
def test_no_sum_has_a_higher_rank_than_its_matrix(shape, ranks):
    torch.manual_seed(0)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    parts = [Factors(torch.randn(rows, r), torch.randn(r, columns)) for r in ranks]
    if columns == 1:
        parts = [Factors.whole(torch.randn(rows)) for _ in ranks]
    total = sum_of_products(parts, shape)
    assert total.rank <= min(rows, columns)
    assert torch.allclose(total.product(), sum(part.product() for part in parts), atol=1e-5)


def test_nothing_added_is_no_product():
    assert sum_of_products([], (4, 6)) is None
    assert sum_of_products([Factors(torch.ones(4, 0), torch.ones(0, 6))] * 2, (4, 6)) is None


def test_trained_weights_move_the_whole_product():
    """What a forward sees is base plus weighted deltas; the gradient of a weight is that of the dense sum."""
    base, deltas = three()
    before = {n: t.detach().clone() for n, t in canonical_tensors(base).items()}
    merged = MergedTensors(base, MergeSource.all(list(deltas.values()), list(deltas)))
    coefficients = torch.tensor([[0.5, -0.3, 0.2]], requires_grad=True)
    merged.write(coefficients)
    used = merged.tensors(coefficients)
    dense = {n: [d.tensors[n].dense(d.q).view_as(before[n]) for d in deltas.values()] for n in merged.names}
    for name in merged.names:
        expected = before[name] + sum(w * d for w, d in zip(coefficients[0].tolist(), dense[name], strict=True))
        assert torch.allclose(canonical_tensors(base)[name], expected, atol=1e-6), name
    name = "layers.0.0.weight"
    direction = torch.randn(before[name].shape, generator=torch.Generator().manual_seed(0))
    (used[name] * direction).sum().backward()
    assert torch.allclose(coefficients.grad[0], torch.stack([(d * direction).sum() for d in dense[name]]), atol=1e-5)
    merged.restore()
    assert all(torch.equal(t, before[n]) for n, t in canonical_tensors(base).items())


@pytest.mark.parametrize(("settings", "told"), [({"rank": 1}, 0), ({"rank": 1, "rest": 0.5}, 1)])
def test_low_rank_depends_on_a_seed_only_by_its_rest(settings, told, recwarn):
    base, first = pair()
    deltas = {
        "a": prune(base, first, "lowrank", carry=["head.*"], **settings),
        "b": prune(base, pair(scale=0.02)[1], "lowrank", carry=["head.*"], **settings),
    }
    merge(base, deltas, "task-arithmetic")
    assert len(recwarn.list) == told
