"""Selections: which entries of a delta stay. Functions over all pruned tensors that yield the kept ones of each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from dpp_lightning.pairs import Pair
from dpp_lightning.ranking import at_least, inclusion_rate, largest
from dpp_lightning.rescaling import keep_rate
from dpp_lightning.sampling import exact_rate, kept_positions_of, uniform_words

Budget = Literal["tensor", "model"]


@dataclass(frozen=True)
class Kept:
    """The kept entries of one tensor.

    Attributes:
        positions: sorted distinct flat positions, int64, on the CPU, shape (kept,).
        values: what is kept of them where the selection itself weighs them, float32, shape (kept,); None for the
            delta itself.
    """

    positions: Tensor
    values: Tensor | None = None


class Selection(Protocol):
    """One selection: all pruned tensors, the rate, the mask seed and the method's own settings to the kept entries.

    Yields one :class:`Kept` for each pair in order; reads a tensor in blocks and holds the kept entries of one tensor.
    """

    def __call__(self, pairs: Sequence[Pair], pruning_rate: float, seed: int) -> Iterator[Kept]: ...


def random(pairs: Sequence[Pair], pruning_rate: float, seed: int) -> Iterator[Kept]:
    """Keep each entry independently with probability 1 - p (DARE, Yu et al. 2024), whatever its value.

    A function of (seed, name, position) alone, see :mod:`dpp_lightning.sampling`.
    """
    for positions in kept_positions_of([(pair.name, pair.numel) for pair in pairs], pruning_rate, seed):
        yield Kept(torch.from_numpy(positions))


def magnitude(pairs: Sequence[Pair], pruning_rate: float, seed: int, *, budget: Budget = "tensor") -> Iterator[Kept]:
    """Keep the k = n - floor(p n) largest |delta| (MP), exactly k: of equal ones the first.

    Args:
        pairs, pruning_rate: as for every selection.
        seed: not used.
        budget: ``tensor`` counts n in each tensor, ``model`` over all of them.
    """
    threshold, left = None, 0
    for pair, group in _budgets(pairs, budget):
        if group:
            count = _exact_count(sum(p.numel for p in group), pruning_rate)
            threshold = largest(partial(_scores, group), count) if count else None
            left = threshold.ties if threshold else 0
        kept = _Growing(torch.int64)
        for start, delta in pair.deltas():
            if threshold is not None:
                found, left = threshold.positions(delta.abs_(), left)
                kept.append(found + start)
        yield Kept(kept.tensor())


def importance(pairs: Sequence[Pair], pruning_rate: float, seed: int, *, budget: Budget = "model") -> Iterator[Kept]:
    """Keep entry j independently with probability pi_j = min(1, lambda |delta_j|), with sum of pi = (1 - p) n.

    The value is (delta_j / pi_j)(1 - p), so that q = 1 - p gives the unbiased (Horvitz-Thompson) estimate of least
    variance. Below the cap every value is the same but for its sign.

    Args:
        pairs, pruning_rate: as for every selection.
        seed: of one 32-bit word per entry, a function of (seed, name, position).
        budget: ``model`` counts n over all pruned tensors, ``tensor`` in each.
    """
    keep = 1 - exact_rate(pruning_rate)
    for pair, group in _budgets(pairs, budget):
        if group:
            total = float(keep * sum(p.numel for p in group))
            rate, cap = inclusion_rate(partial(_scores, group), total)
        positions, values = _Growing(torch.int64), _Growing(torch.float32)
        for start, delta in pair.deltas():
            found, value = _weighed(pair, start, delta, rate, cap, keep_rate(pruning_rate), seed)
            positions.append(found)
            values.append(value)
        yield Kept(positions.tensor(), values.tensor())


class _Growing:
    """One-dimensional tensors put together in a buffer that doubles.

    A list of small tensors would do, but each would be cut from the hole that a block's large temporaries left, so that
    the next block needs new memory: it would grow by a block's size for every block.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer, self._size = torch.empty(1 << 12, dtype=dtype), 0

    def append(self, part: Tensor) -> None:
        """Copy the next entries in."""
        size = self._size + len(part)
        if size > len(self._buffer):
            larger = torch.empty(max(size, 2 * len(self._buffer)), dtype=part.dtype)
            larger[: self._size] = self._buffer[: self._size]
            self._buffer = larger
        self._buffer[self._size : size] = part
        self._size = size

    def tensor(self) -> Tensor:
        """All entries, without the rest of the buffer."""
        return self._buffer[: self._size].clone()


def _weighed(
    pair: Pair, start: int, delta: Tensor, rate: float, cap: int, keep: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Kept positions and values of one block, given lambda and the bits of the cap."""
    scores = delta.abs()
    capped = at_least(scores, cap)
    if rate == float("inf"):
        kept = capped
    else:
        words = torch.from_numpy(uniform_words(pair.name, seed, start, start + len(delta)).astype("float64"))
        kept = capped | (words < scores.double() * (rate * 2.0**32))
    found = torch.from_numpy(kept.numpy().nonzero()[0])
    value = torch.where(capped[found], delta[found] * keep, torch.sign(delta[found]) * (keep / rate))
    return found + start, value


def _budgets(pairs: Sequence[Pair], budget: Budget) -> Iterator[tuple[Pair, Sequence[Pair]]]:
    """Every pair, with the pairs that share one budget beside the first of them."""
    if budget not in ("tensor", "model"):
        raise ValueError(f"budget must be 'tensor' or 'model', got {budget!r}")
    for index, pair in enumerate(pairs):
        yield pair, ([pair] if budget == "tensor" else pairs if index == 0 else ())


def _scores(pairs: Iterable[Pair]) -> Iterator[Tensor]:
    for pair in pairs:
        for _, delta in pair.deltas():
            yield delta.abs_()


def _exact_count(numel: int, pruning_rate: float) -> int:
    """k = n - floor(p n) with p as an exact decimal."""
    return numel - int(exact_rate(pruning_rate) * numel)
