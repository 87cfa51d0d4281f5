"""Kept entries of one tensor, and the plainest way to choose them: those that rank highest, an exact number of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dpp_lightning.pairs import Pair
from dpp_lightning.ranking import RankThreshold, largest
from dpp_lightning.sampling import exact_rate


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


def ranked(pairs: Sequence[Pair], counts: Iterable[int], kind: str = "magnitude") -> Iterator[Kept]:
    """Keep the ``count`` highest scores of each tensor, exactly that many: of equal ones the first.

    Args:
        pairs: the pruned tensors.
        counts: one number for each, in [0, numel].
        kind: of score, see :meth:`dpp_lightning.pairs.Pair.scores`.
    """
    for pair, count in zip(pairs, counts, strict=True):
        threshold = largest(partial(scores_of, [pair], kind), count) if count else None
        yield above(pair, threshold, threshold.ties if threshold else 0, kind)[0]


def above(pair: Pair, threshold: RankThreshold | None, ties: int, kind: str = "magnitude") -> tuple[Kept, int]:
    """What one tensor has above a threshold, and how many of the ``ties`` are left for the tensors after it."""
    kept = Growing(torch.int64)
    if threshold is not None:
        for start, _, scores in pair.scores(kind):
            found, ties = threshold.positions(scores, ties)
            kept.append(found + start)
    return Kept(kept.tensor()), ties


def scores_of(pairs: Iterable[Pair], kind: str) -> Iterator[Tensor]:
    """All scores of some tensors, block by block."""
    for pair in pairs:
        for _, _, scores in pair.scores(kind):
            yield scores


def exact_count(numel: int, pruning_rate: float) -> int:
    """k = n - floor(p n) with p as an exact decimal."""
    return numel - int(exact_rate(pruning_rate) * numel)


class Growing:
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
