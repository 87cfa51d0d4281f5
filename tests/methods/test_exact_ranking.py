"""Exact ranks and inclusion rates: the same as sorting everything, however the scores come in blocks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpp_lightning.methods.exact_ranking import TopScores, at_least, inclusion_rate, largest

LARGEST = 3.4028234663852886e38
SPECIAL = [0.0, 1e-45, 1e-42, 1.1754942e-38, 1.1754944e-38, 0.5, 1.0, 1.0000001, LARGEST]


def kept_by_sorting(scores, count):
    """The slow twin: sorted by value from the top, equal ones in their order."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def kept_by_threshold(scores, count, block):
    blocks = scores.split(block)
    threshold = largest(lambda: blocks, count)
    ties, parts, start = threshold.ties, [], 0
    for part in blocks:
        found, ties = threshold.positions(part, ties)
        parts.append(found + start)
        start += len(part)
    assert ties == 0
    return torch.cat(parts)


def rate_by_sorting(scores, budget):
    """The slow twin in float64: the most scores at probability 1 for which the next one stays at or below it."""
    positive = np.sort(scores.double().numpy()[scores.numpy() > 0])[::-1]
    if len(positive) <= budget:
        return math.inf
    for capped in range(len(positive)):
        rate = (budget - capped) / math.fsum(positive[capped:])
        if rate * positive[capped] <= 1 + 1e-12:
            return rate
    raise AssertionError("no rate")


@st.composite
def score_lists(draw):
    """Few distinct numbers or many, over any part of the range of float32; blocks of any size."""
    count, seed = draw(st.integers(1, 400)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["ties", "special", "normal", "wide", "narrow", "bits", "equal"]))
    made = {
        "ties": lambda: rng.integers(0, 4, count) / 4,
        "special": lambda: rng.choice(SPECIAL[:-1], count),
        "normal": lambda: np.abs(rng.standard_normal(count)) * rng.integers(0, 2, count),
        "wide": lambda: np.exp(rng.uniform(-80, 80, count)),
        "narrow": lambda: 1 + rng.integers(0, 50, count) * 2.0**-23,
        "bits": lambda: rng.integers(0, 0x7F7FFFFF, count, dtype=np.int32, endpoint=True).view(np.float32),
        "equal": lambda: np.full(count, rng.choice(SPECIAL)),
    }
    return torch.from_numpy(made[kind]().astype(np.float32)), draw(st.integers(1, 400))


@settings(max_examples=200, deadline=None)
@given(score_lists(), st.floats(0, 1))
@example((torch.tensor(SPECIAL), 2), 0.5)
@example((torch.zeros(10), 3), 0.5)
def test_the_largest_are_those_of_sorting(case, share):
    scores, block = case
    count = max(1, round(share * len(scores)))
    assert torch.equal(kept_by_threshold(scores, count, block), kept_by_sorting(scores, count))


@settings(max_examples=200, deadline=None)
@given(score_lists(), st.floats(0, 1), st.integers(1, 50))
@example((torch.tensor(SPECIAL), 2), 0.5, 1)
@example((torch.zeros(10), 3), 0.5, 2)
def test_one_pass_gives_those_of_sorting_or_nothing(case, share, stride):
    scores, block = case
    count = max(1, round(share * len(scores)))
    top = TopScores.bounded_by(scores[::stride].clone(), count, len(scores))
    for start in range(0, len(scores), block):
        assert top.add_from(start, scores[start : start + block])
    found = top.positions()
    assert found is not None or len(scores[::stride]) < len(scores)
    if found is not None:
        assert torch.equal(found, kept_by_sorting(scores, count))


def test_one_pass_is_enough_for_most_streams_and_says_where_it_is_not():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1 << 20, generator=generator).abs()
    for share in (0.5, 0.1, 0.01, 0.001, 1e-5):
        count = max(1, round(share * len(scores)))
        top = TopScores.bounded_by(scores[::16], count, len(scores))
        assert top.add_from(0, scores)
        assert torch.equal(top.positions(), kept_by_sorting(scores, count))
    misled = TopScores.bounded_by(torch.full((1000,), 9.0), 100, len(scores))
    misled.add_from(0, scores)
    assert misled.positions() is None
    flooded = TopScores.bounded_by(torch.zeros(1000), 100, len(scores))
    assert not flooded.add_from(0, scores)
    broken = TopScores.bounded_by(scores[:1000], 100, len(scores))
    broken.add_from(0, torch.tensor([1.0, math.nan, math.inf]))
    with pytest.raises(ValueError, match="2 delta entries are not finite"):
        broken.positions()


def test_every_count_with_many_ties():
    scores = torch.tensor([0.5, 0, 1, 0.5, 0.25, 1, 0.5, 0, 1e-45, 0.5, 1e-45, 1])
    for count in range(1, len(scores) + 1):
        for block in (1, 2, 5, 12):
            assert torch.equal(kept_by_threshold(scores, count, block), kept_by_sorting(scores, count))


def test_of_equal_scores_the_first_are_kept():
    """By value alone all or none of ten equal ones would be."""
    assert kept_by_threshold(torch.full((10,), 0.1), 4, 3).tolist() == [0, 1, 2, 3]


@settings(max_examples=300, deadline=None)
@given(score_lists(), st.floats(0.0005, 1))
@example((torch.tensor([1e30] + [1e-30] * 9), 3), 0.5)
@example((torch.full((7,), 0.1), 3), 1.0)
def test_the_rate_is_that_of_sorting(case, keep):
    scores, block = case
    budget = keep * len(scores)
    blocks = scores.split(block)
    near = 1e-9 if keep < 0.999 else 1e-7  # of nearly all, what those below 1 share is a difference of sums that cancel
    rate, bits = inclusion_rate(lambda: blocks, budget)
    assert rate == pytest.approx(rate_by_sorting(scores, budget), rel=near)
    capped = at_least(scores, bits)
    positive = int((scores > 0).sum())
    if math.isinf(rate):
        assert positive <= budget
        assert torch.equal(capped, scores > 0)
        return
    below = scores[~capped].double().numpy() * rate
    assert int(capped.sum()) + math.fsum(below) == pytest.approx(budget, rel=near)
    assert positive > budget
    assert not len(below) or below.max() <= 1 + near
    assert not bool(capped.any()) or float(scores[capped].min()) * rate >= 1 - near


@pytest.mark.parametrize(
    ("scores", "budget", "expected"),
    [
        ([0.0] * 5, 2.5, (math.inf, 1)),
        ([0.0, 0.0, 3.0, 0.0], 2.0, (math.inf, 1)),
        ([1e-45, 0.0, 3.0, 0.0], 2.0, (math.inf, 1)),
        ([0.1, 0.2, 0.4], 3.0, (math.inf, 1)),
        ([1.0] * 8, 2.0, 0.25),
        ([1.0] * 8 + [1e6], 3.0, 0.25),
        ([1.0, 2.0, 3.0, 4.0], 1.0, 0.1),
        ([1e-45] * 4, 1.0, 0.25 / 2**-149),
        ([LARGEST] * 4, 1.0, 0.25 / LARGEST),
        ([LARGEST] + [1e-45] * 4, 2.0, 0.25 / 2**-149),
    ],
)
def test_rates_worked_out_by_hand(scores, budget, expected):
    found = inclusion_rate(lambda: [torch.tensor(scores)], budget)
    if isinstance(expected, tuple):
        assert found == expected
    else:
        assert found[0] == pytest.approx(expected, rel=1e-12)


def test_a_million_scores_meet_the_budget():
    """Heavy tails: some thousand at the cap, the others share what is left."""
    scores = torch.from_numpy(np.abs(np.random.default_rng(0).standard_cauchy(1_000_000)).astype(np.float32))
    for budget in (500_000.0, 100_000.0, 10_000.0, 1000.0):
        rate, bits = inclusion_rate(lambda: scores.split(1 << 18), budget)
        capped = at_least(scores, bits)
        total = int(capped.sum()) + float((scores[~capped].double() * rate).sum())
        assert total == pytest.approx(budget, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(score_lists(), st.floats(0.0005, 1), st.integers(1, 20))
def test_a_sample_saves_a_pass_and_changes_nothing(case, keep, stride):
    scores, block = case
    budget, blocks = keep * len(scores), scores.split(block)
    sample = scores[::stride]
    weights = torch.full((len(sample),), len(scores) / len(sample))
    rate, bits = inclusion_rate(lambda: blocks, budget)
    sampled_rate, sampled_bits = inclusion_rate(lambda: blocks, budget, (sample, weights))
    assert sampled_rate == pytest.approx(rate, rel=1e-9)
    certain, sampled = at_least(scores, bits), at_least(scores, sampled_bits)
    assert (
        torch.equal(certain, sampled) or (certain ^ sampled).sum() == (scores[certain ^ sampled] * rate).round().sum()
    )


def test_a_sample_saves_a_pass():
    scores = torch.from_numpy(np.abs(np.random.default_rng(0).standard_cauchy(1_000_000)).astype(np.float32))
    passes = []

    def blocks():
        passes.append(1)
        return scores.split(1 << 18)

    rate, _ = inclusion_rate(blocks, 10_000.0, (scores[::50], torch.full((20_000,), 50.0)))
    assert len(passes) == 1
    assert rate == pytest.approx(rate_by_sorting(scores, 10_000.0), rel=1e-9)


def test_no_scores_at_all():
    assert inclusion_rate(list, 0.0) == (math.inf, 1)
    with pytest.raises(ValueError, match="cannot keep 1 of 0"):
        largest(list, 1)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("nan")])
def test_scores_that_are_not_finite_are_refused(bad):
    scores = torch.tensor([1.0, 0.0, bad, bad]).abs()
    for find in (largest, inclusion_rate):
        with pytest.raises(ValueError, match="2 delta entries are not finite"):
            find(lambda: [scores[:3], scores[3:]], 1)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="cannot keep 4 of 3"):
        largest(lambda: [torch.ones(3)], 4)
