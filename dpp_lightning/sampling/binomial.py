"""How many entries a block keeps: Binomial(n, keep) from one 64-bit draw, by exact integer thresholds."""

from fractions import Fraction
from functools import lru_cache
from math import log, sqrt

import numpy as np
import numpy.typing as npt

from dpp_lightning.sampling.philox import BLOCK, Int64Array, UInt64Array

_NEAR = 1e-9  # far above the error of the approximate distribution function, below which exact thresholds decide
_DEVIATIONS, _MORE = 20, 64  # beyond which no count has a probability of 2**-64


def kept_counts(n: int, keep: Fraction, draws: UInt64Array) -> Int64Array:
    """The count of each draw: the number of thresholds at or below it, see :func:`binomial_thresholds`.

    Thresholds of a size that is not that of a whole block are costly and seldom used more than once, so there the
    distribution function in floating point decides, but for draws so near to one of its steps that it might err.

    Args:
        n: entries of the block, from 1 to ``BLOCK``.
        keep: the probability that one is kept, above 0 and below 1.
        draws: uniform 64-bit numbers, shape (rows,).
    """
    if n == BLOCK:
        return _exact_counts(n, keep, draws)
    lowest, steps = _approximate_steps(n, keep)
    uniform = draws / 2.0**64
    below, above = (np.searchsorted(steps, uniform + shift, side="right") for shift in (-_NEAR, _NEAR))
    counts: Int64Array = lowest + below
    if (near := below != above).any():
        counts[near] = _exact_counts(n, keep, draws[near])
    return counts


def _exact_counts(n: int, keep: Fraction, draws: UInt64Array) -> Int64Array:
    lowest, thresholds = binomial_thresholds(n, keep)
    return lowest + np.searchsorted(thresholds, draws, side="right")


@lru_cache(maxsize=512)
def _approximate_steps(n: int, keep: Fraction) -> tuple[int, npt.NDArray[np.float64]]:
    """(lowest count c0, F) with F[j] about P(count <= c0 + j), within a hundredth of ``_NEAR``."""
    # of integers, as the quotient of a rate next to 0 or 1 is beyond a float
    odds, mode = log(keep.numerator) - log(keep.denominator - keep.numerator), _mode(n, keep)
    reach = int(_DEVIATIONS * sqrt(n * keep * (1 - keep))) + _MORE
    upward = np.arange(mode, min(n, mode + reach))
    downward = np.arange(mode, max(0, mode - reach), -1)
    above = np.cumsum(np.log((n - upward) / (upward + 1)) + odds)
    below = np.cumsum(np.log(downward / (n - downward + 1)) - odds)
    steps = np.cumsum(np.exp(np.concatenate([below[::-1], [0.0], above])))
    return mode - len(below), steps[:-1] / steps[-1]


def _mode(n: int, keep: Fraction) -> int:
    return min(n, (n + 1) * keep.numerator // keep.denominator)


@lru_cache(maxsize=512)
def binomial_thresholds(n: int, keep: Fraction) -> tuple[int, UInt64Array]:
    """(lowest count c0, T) with T[j] = floor(2**64 * P(count <= c0 + j)) for Binomial(n, keep), in exact integers.

    The weight of the mode is 2**256, and the others follow from the ratio of neighbouring terms, in both directions,
    until they round down to 0. The rounding is far below the last of a threshold's 64 bits.
    """
    a, b = keep.numerator, keep.denominator - keep.numerator
    mode = _mode(n, keep)
    above, weight, count = [], 1 << 256, mode
    while weight and count <= n:
        above.append(weight)
        weight = weight * (n - count) * a // ((count + 1) * b)
        count += 1
    below, weight, count = [], 1 << 256, mode
    while weight and count > 0:
        weight = weight * count * b // ((n - count + 1) * a)
        below.append(weight)
        count -= 1
    weights = below[::-1] + above
    total, running, thresholds = sum(weights), 0, []
    for w in weights[:-1]:
        running += w
        thresholds.append((running << 64) // total)
    return mode - len(below), np.array(thresholds, dtype=np.uint64)
