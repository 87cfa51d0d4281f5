"""Kept entries of one tensor, and the plainest way to choose them: those that rank highest, an exact number of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpp_lightning.sampling.sampler import exact_rate


@dataclass(frozen=True)
class KeptEntries:
    """The kept entries of one tensor.

    Attributes:
        positions: sorted distinct flat positions, int64, on the CPU, shape (kept,).
        values: what is kept of them where the selection itself weighs them, float32, shape (kept,); None for the
            delta itself.
    """

    positions: Tensor
    values: Tensor | None = None


def exact_count(numel: int, pruning_rate: float) -> int:
    """k = n - floor(p n) with p as an exact decimal."""
    return numel - int(exact_rate(pruning_rate) * numel)


class GrowingBuffer:
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
