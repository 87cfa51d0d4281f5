"""Selections: exact counts and ties by magnitude; by importance unbiased, within budget, of less variance than chance."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpp_lightning import METHODS
from dpp_lightning.methods import selections, tensor_pair
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.sampling.sampler import kept_positions

RATES = [0.0, 0.1, 0.29, 0.5, 0.9, 0.99, 0.999, 1 - 1e-6]


def pair_of(name, delta):
    """A base of zeros, so that the delta is exact."""
    delta = torch.as_tensor(delta, dtype=torch.float32)
    return TensorPair.of(name, torch.zeros_like(delta), delta)


def heavy(count, seed=0, name="w"):
    return pair_of(name, torch.from_numpy(np.random.default_rng(seed).standard_cauchy(count) * 1e-3))


def chosen(method, tensors, rate, seed=0, **settings_):
    return list(getattr(selections, method)(tensors, rate, seed, **settings_))


def count_kept(numel, rate):
    return numel - int(Fraction(str(rate)) * numel)


@st.composite
def tensors(draw):
    """A few deltas, with many ties or none, of odd shapes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ties, made = draw(st.booleans()), []
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(), (0,), (1,), (7,), (0, 3), (5, 6), (300,), (2, 3, 40)]))
        made.append(pair_of(f"w{number}", rng.integers(-3, 4, shape) / 8 if ties else rng.standard_normal(shape)))
    return made


@settings(max_examples=150, deadline=None)
@given(tensors(), st.sampled_from(RATES), st.sampled_from(["tensor", "model"]), st.sampled_from([1, 7, 64, 1 << 20]))
def test_magnitude_keeps_what_sorting_keeps(made, rate, budget, block):
    """The slow twin sorts all of it, by value from the top, equal ones in their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_pair, "BLOCK", block)
        found = [kept.positions for kept in chosen("magnitude", made, rate, budget=budget)]
    sizes = [pair.numel for pair in made]
    groups = [[i] for i in range(len(made))] if budget == "tensor" else [list(range(len(made)))]
    for group in groups:
        scores = torch.cat([made[i].finetuned.abs() for i in group])
        count = count_kept(len(scores), rate)
        expected = torch.sort(scores, descending=True, stable=True).indices[:count].sort().values
        starts = np.cumsum([0, *[sizes[i] for i in group]])[:-1].tolist()
        together = torch.cat([found[i] + start for i, start in zip(group, starts, strict=True)])
        assert torch.equal(together, expected)
    assert sum(map(len, found)) == (
        sum(count_kept(n, rate) for n in sizes) if budget == "tensor" else count_kept(sum(sizes), rate)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1000, 1 << 19])
@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e4])
def test_entries_above_a_bound_are_those_of_the_exact_difference(monkeypatch, dtype, block, scale):
    """Differences are rounded to the tensors' dtype first, to halves of a step apart or out of its range."""
    monkeypatch.setattr(tensor_pair, "BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(7001, generator=generator).to(dtype)
    finetuned = (base.float() + scale * torch.randn(7001, generator=generator)).to(dtype)
    finetuned[[5, 6000]] = torch.tensor([float("nan"), float("inf")], dtype=dtype)
    pair = TensorPair.of("w", base, finetuned)
    exact = (finetuned.float() - base.float()).abs()
    assert pair.plain
    for bound in (0.0, *exact.nan_to_num(0.0).quantile(torch.tensor([0.1, 0.5, 0.9, 0.99, 1.0])).tolist()):
        found = list(pair.above(bound))
        positions, sizes = torch.cat([p for p, _ in found]), torch.cat([s for _, s in found])
        assert torch.equal(positions, (~(exact < bound)).nonzero().flatten())
        torch.testing.assert_close(sizes, exact[positions], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99, 0.9999])
def test_a_tensor_of_several_blocks_is_ranked_as_by_sorting(monkeypatch, dtype, rate):
    monkeypatch.setattr(tensor_pair, "BLOCK", 4096)
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(300, 200, generator=generator).to(dtype)
    finetuned = (base + 1e-2 * torch.randn(300, 200, generator=generator).to(dtype)).to(dtype)
    (kept,) = chosen("magnitude", [TensorPair.of("w", base, finetuned)], rate)
    size = (finetuned.float() - base.float()).abs().flatten()
    expected = size.sort(descending=True, stable=True).indices[: count_kept(60_000, rate)].sort().values
    assert torch.equal(kept.positions, expected)


@pytest.mark.parametrize("rate", RATES)
def test_random_keeps_what_the_sampler_draws(rate):
    made = [heavy(n, name=f"w{n}") for n in (70_000, 1, 0, 300)]
    for pair, kept in zip(made, chosen("random", made, rate, seed=3), strict=True):
        assert kept.values is None
        assert kept.positions.tolist() == kept_positions(pair.name, pair.numel, rate, 3).tolist()


@pytest.mark.parametrize("method", ["magnitude", "importance"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_deltas_that_are_not_finite_are_refused(method, bad):
    delta = torch.ones(50)
    delta[20] = bad
    for budget in ("tensor", "model"):
        with pytest.raises(ValueError, match="1 delta entries are not finite"):
            chosen(method, [heavy(10), pair_of("v", delta)], 0.5, budget=budget)


@pytest.mark.parametrize("method", ["magnitude", "importance"])
def test_an_unknown_budget_is_refused(method):
    with pytest.raises(ValueError, match="budget must be 'tensor' or 'model'"):
        chosen(method, [heavy(10)], 0.5, budget="layer")


# --- importance ---


def probabilities(deltas, rate):
    """The slow twin: pi = min(1, lambda |delta|), by bisection in float64."""
    scores, budget = np.abs(np.asarray(deltas, dtype=np.float64)), (1 - rate) * len(deltas)
    low, high = 0.0, 1.0 / scores[scores > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * scores).sum() < budget else (low, middle)
    return np.minimum(1, low * scores)


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_importance_is_unbiased_and_of_known_variance(rate):
    """z-scores over 600 seeds: each entry's mean of value / q, and how often it is kept."""
    pair, seeds = heavy(300), 600
    delta, q = pair.finetuned.double().numpy(), 1 - rate
    total, often = np.zeros(300), np.zeros(300)
    for seed in range(seeds):
        (kept,) = chosen("importance", [pair], rate, seed)
        total[kept.positions] += kept.values.double().numpy() / q
        often[kept.positions] += 1
    pi = probabilities(delta, rate)
    deviation = np.sqrt(pi * (1 - pi) / seeds)
    free = deviation > 1e-6
    assert np.all(often[pi > 1 - 1e-9] == seeds)
    counted = (often / seeds - pi)[free] / deviation[free]
    assert np.abs(counted).max() < 4.5
    assert np.mean(counted**2) == pytest.approx(1, abs=0.35)
    np.testing.assert_allclose(total[~free] / seeds, delta[~free], rtol=1e-6)
    estimated = (total / seeds - delta)[free] / (np.abs(delta) / pi * deviation)[free]
    assert np.abs(estimated).max() < 4.5
    assert abs(estimated.mean()) < 4.5 / np.sqrt(free.sum())


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_importance_has_less_variance_than_uniform_dropping(rate):
    """Squared error of the whole delta at one rate, measured on both."""
    pair = heavy(20_000)
    delta, q, error = pair.finetuned.double(), 1 - rate, {"random": 0.0, "importance": 0.0}
    for seed in range(10):
        for method in error:
            (kept,) = chosen(method, [pair], rate, seed)
            values = pair.finetuned[kept.positions] if kept.values is None else kept.values
            guess = torch.zeros_like(delta)
            guess[kept.positions] = values.double() / q
            error[method] += float(((guess - delta) ** 2).sum()) / 10
    pi = probabilities(delta, rate)
    expected = float((delta.numpy() ** 2 * (1 / pi - 1)).sum())
    assert error["importance"] == pytest.approx(expected, rel=0.1)
    assert error["importance"] < 0.05 * error["random"]


@pytest.mark.parametrize("budget", ["tensor", "model"])
def test_below_the_cap_all_values_share_one_magnitude(budget):
    """Per budget; those at the cap are the delta itself, times q = 1 - p."""
    made, rate = [heavy(5000, 1, "a"), heavy(3000, 2, "b")], 0.9
    kept = chosen("importance", made, rate, budget=budget)
    magnitudes = set()
    for pair, part in zip(made, kept, strict=True):
        delta = pair.finetuned[part.positions]
        whole = torch.isclose(part.values, 0.1 * delta, rtol=1e-6, atol=0)
        shared = part.values[~whole].abs().unique()
        assert len(shared) == 1
        assert 10 < int(whole.sum()) < len(whole) / 2
        assert float((0.1 * delta[whole]).abs().min()) > float(shared) * 0.999
        assert torch.equal(part.values.sign(), delta.sign())
        magnitudes.add(float(shared))
    assert len(magnitudes) == (1 if budget == "model" else 2)


@pytest.mark.parametrize("rate", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-40])
def test_importance_keeps_as_many_as_the_budget_says(rate, scale):
    """Also where lambda is beyond float32, for deltas of subnormal numbers."""
    pair = pair_of("w", scale * torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    (kept,) = chosen("importance", [pair], rate)
    budget = (1 - rate) * 100_000
    assert abs(len(kept.positions) - budget) < 5 * budget**0.5
    assert bool((kept.positions.diff() > 0).all())


def test_rate_zero_keeps_every_change_exactly():
    made = [heavy(1000, 1, "a"), pair_of("b", torch.full((9,), 0.3)), pair_of("c", [0.0, -2.0, 1e-45])]
    for budget in ("tensor", "model"):
        for pair, kept in zip(made, chosen("importance", made, 0.0, budget=budget), strict=True):
            assert kept.positions.tolist() == pair.finetuned.nonzero().flatten().tolist()
            assert torch.equal(kept.values, pair.finetuned[kept.positions])


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_tensors_without_a_change_or_an_entry_keep_nothing(rate):
    made = [pair_of("zeros", torch.zeros(500)), pair_of("none", torch.zeros(0, 3)), pair_of("all", torch.ones(500))]
    for budget in ("tensor", "model"):
        zeros, none, ones = chosen("importance", made, rate, budget=budget)
        assert len(zeros.positions) == len(none.positions) == 0
        assert len(zeros.values) == len(none.values) == 0
        assert len(ones.positions) > 0
    zeros, none = chosen("importance", made[:2], rate)
    assert len(zeros.positions) == len(none.positions) == 0


def test_fewer_changes_than_the_budget_are_all_kept():
    delta = torch.zeros(1000)
    delta[::20] = torch.linspace(-1, 1, 50)
    (kept,) = chosen("importance", [pair_of("w", delta)], 0.9)
    assert kept.positions.tolist() == list(range(0, 1000, 20))
    assert torch.equal(kept.values, delta[::20] * 0.1)


def same(a, b):
    return torch.equal(a.positions, b.positions) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("budget", ["tensor", "model"])
@pytest.mark.parametrize("block", [64, 1000, 8192])
def test_the_size_of_a_block_does_not_matter(monkeypatch, budget, block):
    made = [heavy(5000, 1, "a"), heavy(333, 2, "b"), heavy(1, 3, "c")]
    for rate in (0.0, 0.5, 0.9):
        whole = chosen("importance", made, rate, budget=budget)
        monkeypatch.setattr(tensor_pair, "BLOCK", block)
        assert all(map(same, chosen("importance", made, rate, budget=budget), whole))
        monkeypatch.undo()


def test_a_tensors_own_budget_is_independent_of_the_others():
    made = [heavy(2000, 1, "a"), heavy(700, 2, "b"), heavy(50, 3, "c")]
    together = chosen("importance", made, 0.8, budget="tensor")
    for pair, part in zip(made, together, strict=True):
        assert same(chosen("importance", [pair], 0.8, budget="tensor")[0], part)
    backwards = chosen("importance", made[::-1], 0.8, budget="model")[::-1]
    assert all(map(same, backwards, chosen("importance", made, 0.8, budget="model")))


def test_the_seed_and_the_name_decide():
    a, b = heavy(2000, 1, "a"), heavy(2000, 1, "b")
    (first,) = chosen("importance", [a], 0.8, 1)
    assert same(chosen("importance", [a], 0.8, 1)[0], first)
    assert not torch.equal(chosen("importance", [a], 0.8, 2)[0].positions, first.positions)
    assert not torch.equal(chosen("importance", [b], 0.8, 1)[0].positions, first.positions)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "auto"])  # which draws by other methods
@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_every_method_yields_sorted_positions_of_every_tensor(method, rate):
    made = [heavy(1000, 1, "a"), pair_of("b", torch.tensor(0.5)), pair_of("c", torch.zeros(0, 3)), heavy(40, 2, "d")]
    for block in ("layers.0.", "layers.1."):
        matrix = pair_of(f"{block}q.weight", heavy(600, 3).finetuned.view(20, 30))
        made.append(replace(matrix, block=block, linear=True))
    settings = {"rank": 2} if METHODS[method].factors_dtype else {}
    kept = list(METHODS[method].select(made, rate, 0, **settings))
    assert len(kept) == len(made)
    for pair, part in zip(made, kept, strict=True):
        assert part.positions.dtype == torch.int64
        assert bool((part.positions.diff() > 0).all())
        assert not len(part.positions) or (int(part.positions[0]) >= 0 and int(part.positions[-1]) < pair.numel)
        weighs = METHODS[method].weighs or bool(METHODS[method].factors_dtype)
        assert pair.linear or (part.values is not None) == weighs  # columns are weighed by their share
        assert part.values is None or (part.values.dtype == torch.float32 and len(part.values) == len(part.positions))


def with_inputs(name, delta, seed=0, axis=1, embedding=False):
    squares = (
        torch.rand(delta.shape[axis], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4 * 10
    )
    return TensorPair.of(name, torch.zeros_like(delta), delta, InputStatistics(squares, squares, 10, axis, embedding))


def test_importance_by_activation_is_unbiased_and_has_less_output_variance():
    """Horvitz-Thompson: E[value / (1 - p)] = delta; the layer's output varies less than by |delta| or by chance."""
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(20, 60, generator=g) * 1e-2
    made = with_inputs("w", delta)
    x = torch.randn(60, generator=g) * made.inputs.rms.float()
    error, mean = {}, torch.zeros(1200)
    for name, method, settings_ in (
        ("activation", "importance", {"score": "activation"}), ("magnitude", "importance", {}), ("chance", "random", {})
    ):  # fmt: skip
        total = 0.0
        for seed in range(250):
            (kept,) = chosen(method, [made], 0.8, seed, **settings_)
            values = made.finetuned[kept.positions] if kept.values is None else kept.values
            drawn = torch.zeros(1200).index_copy_(0, kept.positions, values / 0.2)
            mean += drawn / 250 if name == "activation" else 0
            total += float(((drawn.view(20, 60) - delta) @ x).square().mean())
        error[name] = total
    assert error["activation"] < 0.8 * error["magnitude"] < 0.8 * error["chance"]
    deviation = (mean - delta.flatten()).abs() / delta.flatten().abs().mean()
    assert float(deviation.mean()) < 0.3


def test_importance_by_activation_without_inputs_is_that_by_magnitude():
    made = [heavy(500)]
    plain, weighed = (chosen("importance", made, 0.9, 1, score=score)[0] for score in ("magnitude", "activation"))
    assert torch.equal(plain.positions, weighed.positions)
    assert torch.equal(plain.values, weighed.values)


def test_importance_on_embeddings_prefers_tokens_that_came():
    counts = torch.zeros(50, dtype=torch.float64)
    counts[:5] = 20
    made = TensorPair.of(
        "e.weight", torch.zeros(50, 8), torch.full((50, 8), 1e-3), InputStatistics(counts, counts, 100, 0, True)
    )
    (kept,) = chosen("importance", [made], 0.5, 0, score="activation")
    rows = torch.bincount(kept.positions // 8, minlength=50).float()
    assert rows[:5].mean() > 2 * rows[5:].mean() > 0
