"""Exact ranks of scores over any number of blocks, in bounded memory.

The bits of non-negative float32 numbers have the same order as the numbers. One pass is enough where a sample tells a
bound that few scores are above (:class:`TopScores`). Without one a first pass counts scores by the upper half of their
bits, a second one by the lower half, inside the one bin that matters, so that it counts exact numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.methods.kept_entries import GrowingBuffer, true_positions

_HALF = 16  # bits of either half of a float32
_BINS = 1 << 15  # of the upper half, whose sign bit is 0
_INFINITE = 0x7F80  # upper half of infinity; NaN lies above

_COLLECTED = 1 << 22  # scores that are held at once
_BELOW_CAP = 0.8  # of what a sample says, so that the whole is above it

Blocks = Callable[[], Iterable[Tensor]]  # reads all scores again: float32 >= 0, one-dimensional, on the CPU


@dataclass(frozen=True)
class RankThreshold:
    """Keep every score above a number, and the first few that equal it.

    Attributes:
        bits: the number, as the bits of a float32.
        ties: how many scores that equal it are kept, the first in order.
    """

    bits: int
    ties: int

    def positions(self, scores: Tensor, ties: int) -> tuple[Tensor, int]:
        """Kept positions in one block, sorted, and how many of the ``ties`` are left for the blocks after it."""
        bits = _bits(scores)
        kept = true_positions(bits.numpy() >= self.bits)
        equal = true_positions(bits[kept] == self.bits)
        if len(equal) > ties:
            keep = torch.ones(len(kept), dtype=torch.bool)
            keep[equal[ties:]] = False
            kept = kept[keep]
        return kept, max(ties - len(equal), 0)


class TopScores:
    """The largest scores of a stream, an exact number of them, in one pass: those above a bound are collected.

    Args:
        count: how many are wanted, 1 or more.
        bound: a score that is likely to be below the least of them, see :meth:`bounded_by`.
        most: how many may be collected.

    Attributes:
        bound: as given.
    """

    def __init__(self, count: int, bound: float, most: int) -> None:
        self._count, self._most = count, most
        self.bound = bound
        self._positions, self._bits_above = GrowingBuffer(torch.int64), GrowingBuffer(torch.int32)

    @classmethod
    def bounded_by(cls, sample: Tensor, count: int, numel: int) -> TopScores:
        """With a bound from a sample of the stream's scores, below which the wanted ones are unlikely to lie.

        Args:
            sample: float32 >= 0, one-dimensional; a tenth of a per cent of the stream is enough.
            count: how many are wanted, 1 or more.
            numel: scores in the stream.
        """
        expected = len(sample) * count / numel
        rank = min(int(expected + 6 * expected**0.5) + 10, len(sample))  # six deviations of an even sample
        bound = float(np.partition(sample.numpy(), len(sample) - rank)[len(sample) - rank])
        return cls(count, bound, 4 * count + (1 << 16))

    def add(self, positions: Tensor, scores: Tensor) -> bool:
        """Collect the next scores that are not below the bound, with their positions; False if there are too many."""
        self._positions.append(positions)
        self._bits_above.append(_bits(scores))
        return len(self._positions) <= self._most

    def add_from(self, start: int, scores: Tensor) -> bool:
        """The same from a block of all scores, the first of which is at position ``start``."""
        found = true_positions(~(scores.numpy() < np.float32(self.bound)))  # and what is no number
        return self.add(found + start, scores[found])

    def positions(self) -> Tensor | None:
        """The wanted positions, sorted, int64; where scores are equal, the first. None if too few were collected.

        Raises:
            ValueError: scores that are not finite.
        """
        collected = self._bits_above.tensor()
        bits = collected.numpy()
        _check_finite(int((bits >> _HALF >= _INFINITE).sum()))
        if len(bits) < self._count:
            return None
        least = int(np.partition(bits, len(bits) - self._count)[len(bits) - self._count])
        threshold = RankThreshold(least, self._count - int((bits > least).sum()))
        return self._positions.tensor()[threshold.positions(collected.view(torch.float32), threshold.ties)[0]]


def largest(blocks: Blocks, count: int) -> RankThreshold:
    """The threshold that keeps exactly ``count`` >= 1 scores; where scores are equal, the first ones.

    Raises:
        ValueError: scores that are not finite, or fewer than ``count``.
    """
    upper = _upper(blocks)
    if count > int(upper.sum()):
        raise ValueError(f"cannot keep {count} of {int(upper.sum())} scores")
    above = _above(upper)
    bin_ = int((above < count).nonzero()[0])
    inside = above[bin_] + _above(_lower(blocks, bin_))
    low = int((inside < count).nonzero()[0])
    return RankThreshold(bin_ << _HALF | low, count - int(inside[low]))


def inclusion_rate(blocks: Blocks, budget: float, sample: tuple[Tensor, Tensor] | None = None) -> tuple[float, int]:
    """The lambda with sum of min(1, lambda * score) = budget, and the bits from which on a score has probability 1.

    With c scores at probability 1, lambda = (budget - c) / (sum of the remaining scores), where none of those exceeds
    1 / lambda. Exact: no sum is interpolated inside a bin.

    Args:
        blocks: reads all scores, once if the sample serves, else two times.
        budget: the sum of all probabilities.
        sample: some of the scores, and how many each stands for: float32 >= 0, one-dimensional.

    Returns:
        (lambda, bits); (inf, 1) where no more than ``budget`` scores are above 0, which are then all kept.

    Raises:
        ValueError: scores that are not finite.
    """
    found = None if sample is None else _in_one_pass(blocks, budget, _sampled_cap(*sample, budget) * _BELOW_CAP)
    return found or _by_histograms(blocks, budget)


def _in_one_pass(blocks: Blocks, budget: float, bound: float) -> tuple[float, int] | None:
    """:func:`inclusion_rate`, if no more than a few scores are above a bound and 1 / lambda is; else None."""
    large, below, positive = GrowingBuffer(torch.float32), 0.0, 0
    limit = np.float32(min(bound, float(np.finfo(np.float32).max)))
    for scores in blocks():
        found = true_positions(~(scores.numpy() < limit))  # and what is not a number
        positive += int(scores.count_nonzero()) if positive <= budget else 0
        large.append(scores[found])
        below += float(scores.index_fill(0, found, 0.0).sum(dtype=torch.float64))
        if len(large) > _COLLECTED:
            return None
    ordered = large.tensor().sort(descending=True).values
    if not bool(ordered[:1].isfinite().all()):
        return None
    if positive <= budget:
        return float("inf"), 1
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    count, rest = _capped(ordered, counts, ordered.double(), below, budget)
    rate = (budget - count) / rest if rest > 0 else 0.0
    if rate * bound > 1 or not rate:
        return None
    bits = int(_bits(ordered[int(count) - 1])) if count else _INFINITE << _HALF
    return rate, bits


def _sampled_cap(scores: Tensor, weights: Tensor, budget: float) -> float:
    """1 / lambda, as a sample of the scores tells it."""
    ordered, order = scores.sort(descending=True)
    weights = weights[order].double()
    count, rest = _capped(ordered, weights.cumsum(0), weights * ordered, 0.0, budget)
    return rest / (budget - count) if count < budget else 0.0


def _capped(ordered: Tensor, counts: Tensor, summands: Tensor, below: float, budget: float) -> tuple[float, float]:
    """How many scores have probability 1, and the sum of all others.

    Args:
        ordered: the largest scores, descending.
        counts: how many scores there are down to each, itself among them, float64.
        summands: what each adds to the sum, float64.
        below: the sum of all others.
        budget: the sum of all probabilities.
    """
    rest = below + summands.flip(0).cumsum(0).flip(0)  # of each and all that are less
    before = torch.cat([counts.new_zeros(1), counts])[:-1]
    enough = (ordered.double() * (budget - before) <= rest).nonzero()
    if not len(enough):
        return (float(counts[-1]) if len(counts) else 0.0), below
    first = int(enough[0])
    return float(before[first]), float(rest[first])


def _by_histograms(blocks: Blocks, budget: float) -> tuple[float, int]:
    """:func:`inclusion_rate` in two passes and constant memory."""
    sums = torch.zeros(_BINS, dtype=torch.float64)
    counts = _upper(blocks, sums)
    zeros = int(_lower(blocks, 0)[0]) if sums[0] > 0 else int(counts[0])
    if int(counts.sum()) - zeros <= budget:
        return float("inf"), 1
    above, below = _above(counts), torch.cumsum(sums, 0) - sums
    edges = _numbers(torch.arange(_BINS) << _HALF)
    enough = edges * (budget - above - counts) <= below
    bin_ = int(enough.nonzero().max())
    lower, numbers = _lower(blocks, bin_), _numbers((bin_ << _HALF) + torch.arange(1 << _HALF))
    capped = above[bin_] + _above(lower)
    rest = below[bin_] + torch.cumsum(lower * numbers, 0)
    enough = (lower > 0) & (numbers * (budget - capped) <= rest)
    if enough.any():
        low = int(enough.nonzero().max())
        left, total, bits = budget - int(capped[low]), float(rest[low]), (bin_ << _HALF | low) + 1
    else:
        left, total, bits = budget - int(above[bin_] + counts[bin_]), float(below[bin_]), bin_ << _HALF
    return left / total, bits


def at_least(scores: Tensor, bits: int) -> Tensor:
    """Which scores >= 0 have at least these bits; shape of the scores, bool."""
    return _bits(scores) >= bits


def _bits(scores: Tensor) -> Tensor:
    return scores.contiguous().view(torch.int32)


def _numbers(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32).double()


def _above(counts: Tensor) -> Tensor:
    """How many lie in higher bins than each."""
    return counts.flip(0).cumsum(0).flip(0) - counts


def _upper(blocks: Blocks, sums: Tensor | None = None) -> Tensor:
    """Count (int64) of the scores by the upper half of their bits; their sums (float64) are added to ``sums``."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for scores in blocks():
        upper = _bits(scores) >> _HALF
        counts += torch.bincount(upper, minlength=_BINS)
        if sums is not None:
            sums += torch.bincount(upper, weights=scores.double(), minlength=_BINS)
    _check_finite(int(counts[_INFINITE:].sum()))
    return counts


def _check_finite(others: int) -> None:
    if others:
        raise ValueError(f"{others} delta entries are not finite; check both models' weights")


def _lower(blocks: Blocks, bin_: int) -> Tensor:
    """Count of the scores of one bin by the lower half of their bits."""
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for scores in blocks():
        bits = _bits(scores)
        inside = bits[(bits >> _HALF) == bin_]
        if len(inside):
            counts += torch.bincount(inside & 0xFFFF, minlength=1 << _HALF)
    return counts
