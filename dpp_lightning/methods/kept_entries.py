"""The kept entries of one tensor: their positions, how many they are, and a buffer to collect them in."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpp_lightning.sampling.sampler import exact_rate
from dpp_lightning.tensors.factors import Factors


@dataclass(frozen=True)
class KeptEntries:
    """The kept entries of one tensor.

    Attributes:
        positions: sorted distinct flat positions, int64, on the CPU, shape (kept,).
        values: where the selection weighs the kept values, these, float32, shape (kept,); None where the delta itself
            is kept.
        factors: a product that is kept beside them, float32; None where there is none.
    """

    positions: Tensor
    values: Tensor | None = None
    factors: Factors | None = None


def exact_count(numel: int, pruning_rate: float) -> int:
    """How many of n entries are kept: n - floor(p n), with p as an exact decimal."""
    return numel - int(exact_rate(pruning_rate) * numel)


def true_positions(mask: Tensor | NDArray[np.bool_]) -> Tensor:
    """Positions of what is true, int64; numpy finds them several times faster than torch, and compares faster too.

    Args:
        mask: bool, shape (n,).
    """
    return torch.from_numpy(np.flatnonzero(mask.numpy() if isinstance(mask, Tensor) else mask))


class GrowingBuffer:
    """One-dimensional tensors appended to a buffer that doubles when it is full.

    A list of small tensors would use more memory: each would be allocated in the hole that a block's large temporaries
    left, so that the next block would need new memory, a block's size for every block.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer, self._size = torch.empty(1 << 12, dtype=dtype), 0

    def __len__(self) -> int:
        return self._size

    def append(self, block: Tensor) -> None:
        """Copy the next entries in."""
        size = self._size + len(block)
        if size > len(self._buffer):
            larger = torch.empty(max(size, 2 * len(self._buffer)), dtype=block.dtype)
            larger[: self._size] = self._buffer[: self._size]
            self._buffer = larger
        self._buffer[self._size : size] = block
        self._size = size

    def tensor(self) -> Tensor:
        """All entries, without the rest of the buffer."""
        return self._buffer[: self._size].clone()
