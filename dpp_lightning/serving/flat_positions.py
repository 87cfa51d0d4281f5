"""Sorted positions of many tensors in two bytes each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_BITS = 16


class FlatPositions:
    """Flat positions of the kept entries of several tensors, each by its offset in a block of 65,536 entries.

    Args:
        positions: of each tensor, sorted and distinct, any integer dtype, shape (kept,), on the CPU.
    """

    def __init__(self, positions: Sequence[Tensor]) -> None:
        arrays = [p.numpy().astype(np.int64, copy=False) for p in positions]
        together = np.concatenate([np.zeros(0, np.int64), *arrays])
        self._offsets = (together & ((1 << _BLOCK_BITS) - 1)).astype(np.uint16)
        starts, counts = zip(*(_blocks(array) for array in arrays), strict=True) if arrays else ((), ())
        self._starts = np.concatenate([np.zeros(0, np.int64), *starts])
        self._counts = np.concatenate([np.zeros(0, np.int64), *counts]).astype(np.int32)
        ends = np.cumsum([0, *(len(array) for array in arrays)]).tolist()
        self._bounds = list(pairwise(ends))

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self._offsets.nbytes + self._starts.nbytes + self._counts.nbytes

    def unpack(self) -> list[NDArray[np.int64]]:
        """The positions of each tensor, int64, shape (kept,)."""
        positions = np.repeat(self._starts, self._counts)
        positions += self._offsets
        return [positions[start:stop] for start, stop in self._bounds]


def _blocks(positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first position of each block that holds any, and how many it holds."""
    blocks, counts = np.unique(positions >> _BLOCK_BITS, return_counts=True)
    return blocks << _BLOCK_BITS, counts
