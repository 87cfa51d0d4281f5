"""Low rank: the best approximation of each map, by the theorems that say what it is."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dpp_lightning import SparseDelta, prune
from dpp_lightning.methods import low_rank
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.low_rank import decompose, mean_shift, numbers_kept, ranks_of
from dpp_lightning.methods.tensor_pair import TensorPair


def pair_of(delta, name="layers.0.q.weight", inputs=None):
    base = torch.zeros_like(delta)
    return TensorPair.of(name, base, delta, inputs)


def a_delta(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, min(rows, columns))
    left = torch.linalg.qr(torch.randn(rows, len(scale), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(scale), generator=generator)).Q
    return (left * scale) @ right.t()


def inputs_of(x, axis=1):
    return InputStatistics(x.sum(0).double(), x.square().sum(0).double(), len(x), axis, products=(x.t() @ x).double())


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_that_of_eckart_and_young(shape, rank):
    delta = a_delta(*shape)
    (found,) = decompose([pair_of(delta)], [rank])
    values = torch.linalg.svdvals(delta.double())
    error = (delta.reshape(-1) - found.product()).double().square().sum()
    assert found.rank == rank
    assert float(error) == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_large_maps_by_a_random_range_are_as_good_as_the_exact_ones(monkeypatch):
    delta = a_delta(80, 60)
    (exact,) = decompose([pair_of(delta)], [4])
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", 10)
    (near,) = decompose([pair_of(delta)], [4])
    assert torch.allclose(exact.product(), near.product(), atol=1e-4)
    (again,) = decompose([pair_of(delta)], [4])
    assert torch.equal(near.left, again.left)


@pytest.mark.parametrize("exact_side", [10, 1024])
def test_a_map_is_decomposed_once_and_every_rank_is_as_if_it_were_the_first(monkeypatch, exact_side):
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", exact_side)
    pair, ranks, found = (
        pair_of(torch.randn(90, 80, generator=torch.Generator().manual_seed(0))),
        (3, 40, 16, 70, 2),
        [],
    )
    directions = low_rank._directions
    monkeypatch.setattr(low_rank, "_directions", lambda *words: found.append(words[1]) or directions(*words))
    one_after_the_other = [decompose([pair], [rank])[0] for rank in ranks]
    assert found == [16, 64, 70]
    for rank, factors in zip(ranks, one_after_the_other, strict=True):
        (fresh,) = decompose([replace(pair)], [rank])
        assert torch.equal(factors.left, fresh.left)
        assert torch.equal(factors.right, fresh.right)


@pytest.mark.parametrize(("exact_side", "outputs", "size"), [(1024, 8, 10), (1024, 12, 10), (20, 60, 70)])
@pytest.mark.parametrize("axis", [0, 1])
def test_weighted_directions_are_least_squares_over_the_centred_inputs(axis, exact_side, outputs, size, monkeypatch):
    """Against a search from the plain solution: alternating least squares in the metric of the inputs."""
    monkeypatch.setattr(low_rank, "_EXACT_SIDE", exact_side)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, size, generator=generator) * torch.logspace(0, -1.5, size) + 1
    delta = a_delta(outputs, size) if axis == 1 else a_delta(size, outputs)
    (plain,) = decompose([pair_of(delta)], [2])
    (found,) = decompose([pair_of(delta, inputs=inputs_of(x, axis))], [2], weighted=True)
    centred = (x - x.mean(0)).double()

    def error(product):
        left = (delta - product.view(delta.shape)).double()
        return float((centred @ (left.t() if axis == 1 else left)).square().sum())

    target = centred @ (delta.t() if axis == 1 else delta).double()
    values = torch.linalg.svdvals(target)
    assert error(found.product()) == pytest.approx(float(values[2:].square().sum()), rel=1e-3)
    assert error(found.product()) < error(plain.product())


def test_factors_of_a_direction_have_equal_norms():
    (found,) = decompose([pair_of(a_delta(12, 20))], [3])
    assert torch.allclose(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-4)


def test_energy_gives_ranks_to_the_directions_that_explain_most_per_number():
    pairs = [pair_of(a_delta(10, 10) * size, f"layers.{i}.q.weight") for i, size in enumerate((3.0, 1.0, 0.01))]
    assert ranks_of(pairs, 0.9, 2, "even") == [2, 2, 2]
    spread = ranks_of(pairs, 0.9, 2, "energy")
    assert sum(spread) == 6
    assert spread[0] > spread[1] > spread[2]
    gains = [torch.linalg.svdvals(pair.delta().double()).square() for pair in pairs]
    taken = min(float(gain[rank - 1]) for gain, rank in zip(gains, spread, strict=True) if rank)
    left = max(float(gain[rank]) for gain, rank in zip(gains, spread, strict=True) if rank < 8)
    assert taken >= left * (1 - 1e-6)


def test_the_rate_counts_the_numbers_of_the_factors():
    pairs = [pair_of(a_delta(40, 50)), pair_of(torch.randn(40), "layers.0.q.bias")]
    rate = 0.8
    ranks = ranks_of(pairs, rate, 0, "even")
    numbers = ranks[0] * 90 + 40
    budget = (1 - rate) * (40 * 50 + 40)
    assert ranks[1] == 1
    assert budget - 90 < numbers <= budget
    assert numbers_kept([pair.shape for pair in pairs], rate, {"rank": 4, "rest": 0.9}) == pytest.approx(
        4 * 90 + 40 + 200
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "rank must be a whole number"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"rest": 0.0}, "rest must be"),
        ({"damping": 2.0}, "damping must be"),
        ({"rank": 1, "rest": 0.5, "steps": 9}, "nothing is trained beside a sampled rest.*rest= or steps out"),
        ({"rank": 1, "damping": 0.5}, "damping is of a sampled rest, and there is none"),
        ({"rank": float("inf")}, "rank must be a finite number"),
        ({"rank": 1, "rest": float("nan")}, "rest must be a finite number"),
        ({"pruning_rate": 0.0, "scope": "linear", "outside": "revert"}, "at a rate of 0 a low rank keeps less"),
        ({"factors_dtype": "int5"}, "factors_dtype must be one of"),
        ({"pruning_rate": 0.9999}, "leaves fewer numbers than biases"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings, message):
    base, finetuned = two_models()
    with pytest.raises(ValueError, match=message):
        prune(base, finetuned, "lowrank", **{"pruning_rate": 0.5, **settings})


@pytest.mark.parametrize("rank", [3, 4, 8])
def test_an_even_rank_is_the_one_given_beside_a_map_that_has_fewer_rows(rank):
    pairs = [pair_of(a_delta(*shape), name) for name, shape in
             (("a.weight", (64, 64)), ("b.weight", (64, 64)), ("head.weight", (2, 64)))]  # fmt: skip
    assert ranks_of(pairs, 0.9, rank, "even") == [rank, rank, 2]
    if rank >= 4:
        assert ranks_of(pairs, 0.9, rank, "auto") == [rank, rank, 2]


def test_an_even_rank_by_the_rate_gives_the_larger_maps_what_smaller_ones_cannot_take():
    shapes = [(64, 64), (64, 64), (2, 64)]
    for budget in (100, 700, 1413, 2000):
        rank = low_rank.even_rank(shapes, budget)
        numbers = [min(rank, *shape) * sum(shape) for shape in shapes]
        assert sum(numbers) == pytest.approx(budget)
    assert low_rank.even_rank(shapes, 10**9) == 64


def two_models():
    torch.manual_seed(0)
    base = nn.ModuleDict({
        "embed_tokens": nn.Embedding(30, 16),
        "layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 24), "norm": nn.LayerNorm(24)}) for _ in range(2)),
    })  # fmt: skip
    finetuned = nn.ModuleDict({
        "embed_tokens": nn.Embedding(30, 16),
        "layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 24), "norm": nn.LayerNorm(24)}) for _ in range(2)),
    })  # fmt: skip
    finetuned.load_state_dict({n: t + 0.01 * torch.randn_like(t) for n, t in base.state_dict().items()})
    return base, finetuned


def test_maps_have_factors_vectors_are_whole_and_embeddings_stay_the_bases():
    base, finetuned = two_models()
    delta = prune(base, finetuned, "lowrank", rank=2, factors_dtype="float32")
    assert delta.info.reverted == ("embed_tokens.weight",)
    assert {name: tensor.factors.rank for name, tensor in delta.tensors.items()} == {
        name: 2 if name.endswith("q.weight") else 1 for name in delta.tensors
    }
    numbers = 2 * (2 * 40 + 24 + 48)
    assert delta.num_factor_numbers == numbers
    entries = sum(t.numel() for t in finetuned.state_dict().values())
    assert delta.pruning_rate == pytest.approx(1 - numbers / entries)
    pruned = {n: t.clone() for n, t in base.state_dict().items()}
    before = {n: t.clone() for n, t in pruned.items()}
    delta.apply_(pruned)
    for name, tensor in finetuned.state_dict().items():
        if tensor.dim() == 1:
            assert torch.allclose(pruned[name], tensor, atol=1e-6)
    delta.revert_(pruned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.items())


def test_the_rest_is_a_sample_of_what_the_product_leaves():
    base, finetuned = two_models()
    one = prune(
        base, finetuned, "lowrank", rank=2, rest=0.5, damping=1.0, dtype="float32", factors_dtype="float32", seed=1
    )
    left = {n: finetuned.state_dict()[n] - base.state_dict()[n] - t.factors.product().view(t.shape)
            for n, t in one.tensors.items()}  # fmt: skip
    kept = {name: tensor for name, tensor in one.tensors.items() if len(tensor.values)}
    assert set(kept) == {"layers.0.q.weight", "layers.1.q.weight"}
    assert 250 < sum(len(t.values) for t in kept.values()) < 510  # of 768, half in the mean
    total = {name: torch.zeros(tensor.shape) for name, tensor in kept.items()}
    for seed in range(60):
        delta = prune(
            base,
            finetuned,
            "lowrank",
            rank=2,
            rest=0.5,
            damping=1.0,
            dtype="float32",
            factors_dtype="float32",
            seed=seed,
        )
        for name in kept:
            tensor = replace(delta.tensors[name], factors=None)
            total[name] += tensor.dense(1.0) / 60
    for name, mean in total.items():  # the sample is unbiased
        assert float((mean - left[name]).norm() / left[name].norm()) < 0.25


def test_positions_of_the_rest_follow_from_the_seed_and_cost_no_bytes():
    """They are those that ``dare`` keeps at this rate."""
    base, finetuned = two_models()
    delta = prune(base, finetuned, "lowrank", rank=2, rest=0.5, seed=3)
    drawn = prune(base, finetuned, "dare", 0.5, seed=3)
    assert (delta.info.seeded, delta.info.drawn_rate, delta.info.dtype) == (True, 0.5, "int2")
    for name, tensor in delta.tensors.items():
        kept = drawn.tensors[name].indices if name.endswith("q.weight") else tensor.indices[:0]
        assert torch.equal(tensor.indices, kept)
    by_seed, by_index = (delta.to_bytes(positions=positions) for positions in ("seed", "index"))
    assert len(by_seed[0]) < len(by_index[0])
    for files in (by_seed, by_index):
        for name, tensor in SparseDelta.from_bytes(*files).tensors.items():
            assert torch.equal(tensor.indices, delta.tensors[name].indices)
            assert torch.equal(tensor.values, delta.tensors[name].values)
    assert not prune(base, finetuned, "lowrank", rank=2).info.seeded


def test_means_of_what_is_left_out_belong_to_the_bias():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 10, generator=generator) + 2
    pair = pair_of(a_delta(6, 10), inputs=inputs_of(x))
    (found,) = decompose([pair], [1])
    shift = mean_shift(pair, found.product().view(6, 10))
    approximated = x @ found.product().view(6, 10).t() + shift
    assert torch.allclose(approximated.mean(0), (x @ a_delta(6, 10).t()).mean(0), atol=1e-4)
    assert mean_shift(pair_of(a_delta(6, 10)), found.product().view(6, 10)) is None
