"""Counts of kept entries: the quick way gives those of the exact thresholds, also next to every one of them."""

import time
from fractions import Fraction

import numpy as np
import pytest

from dpp_lightning.sampling.binomial import _approximate_steps, binomial_thresholds, kept_counts

KEEPS = [
    Fraction(1, 2),
    Fraction(1, 10),
    Fraction(1, 100),
    Fraction(1, 10**6),
    Fraction(9, 10),
    Fraction(999_999, 10**6),
    1 - Fraction(1, 10**320),
]


def exact(n, keep, draws):
    lowest, thresholds = binomial_thresholds(n, keep)
    return lowest + np.searchsorted(thresholds, draws, side="right")


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 1000, 30_001, 65_535, 65_536])
def test_counts_are_those_of_the_exact_thresholds(n, keep):
    _, thresholds = binomial_thresholds(n, keep)
    beside = [(thresholds.astype(object) + shift) % 2**64 for shift in (-1, 0, 1, -(2**30), 2**30, -(2**36), 2**36)]
    draws = np.random.default_rng(n).integers(0, 2**64, 20_000, dtype=np.uint64)
    draws = np.concatenate(
        [draws, *(numbers.astype(np.uint64) for numbers in beside), [np.uint64(0), np.uint64(2**64 - 1)]]
    )
    np.testing.assert_array_equal(kept_counts(n, keep, draws), exact(n, keep, draws))


@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("n", [1, 7, 1000, 65_535])
def test_the_approximate_distribution_is_far_closer_than_where_it_decides(n, keep):
    lowest, thresholds = binomial_thresholds(n, keep)
    first, steps = _approximate_steps(n, keep)
    of_count = {lowest + j: int(t) / 2.0**64 for j, t in enumerate(thresholds)}
    error = max(abs(step - of_count.get(first + j, float(first + j >= lowest))) for j, step in enumerate(steps))
    assert error < 1e-11


def test_five_hundred_odd_sizes_cost_little():
    """Their exact thresholds take seconds."""
    draws = np.array([2**62], dtype=np.uint64)
    started = time.perf_counter()
    for n in range(65_000, 65_500):
        kept_counts(n, Fraction(1, 2), draws)
    assert time.perf_counter() - started < 1
