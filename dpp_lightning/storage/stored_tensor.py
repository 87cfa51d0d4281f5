"""A tensor that lies in one or several pieces on disk, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 64_000_000  # of a tensor that are in memory at once


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor.

    Attributes:
        offsets, sizes: where it lies in the whole and how long it is, by dimension; empty for a scalar.
        view: gives its values, shape ``sizes``, as pages of a file (nothing is read before it is touched).
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    view: Callable[[], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        dtype, shape: of the whole.
        pieces: rectangles that cover it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """A tensor that is one piece: mapped, or in memory already."""
        shape = tuple(tensor.shape)
        return cls(tensor.dtype, shape, (Piece((0,) * len(shape), shape, lambda: tensor),))

    @property
    def numel(self) -> int:
        """Number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor of rank 1 or more.

        Returns:
            Shape (stop - start, *shape[1:]): a view where they lie in one piece, else a copy.
        """
        inside = [p for p in self.pieces if p.offsets[0] < stop and p.offsets[0] + p.sizes[0] > start]
        for piece in inside:
            first = piece.offsets[0]
            if piece.sizes[1:] == self.shape[1:] and first <= start and first + piece.sizes[0] >= stop:
                return piece.view()[start - first : stop - first]
        rows = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for piece in inside:
            first = piece.offsets[0]
            low, high = max(start, first), min(stop, first + piece.sizes[0])
            columns = tuple(slice(o, o + s) for o, s in zip(piece.offsets[1:], piece.sizes[1:], strict=True))
            rows[(slice(low - start, high - start), *columns)] = piece.view()[low - first : high - first]
        return rows

    def whole(self) -> Tensor:
        """All of it, of any rank: a view where it is one piece, else a copy."""
        return self.rows(0, self.shape[0]) if self.shape else self.pieces[0].view()

    def spans(self, row_bytes: int | None = None) -> Iterator[tuple[int, int]]:
        """First row and the one after the last, of blocks of about ``BLOCK_BYTES``.

        Args:
            row_bytes: what a row takes in memory; by default what it takes on disk.
        """
        size = row_bytes or max(self.nbytes // max(self.shape[0], 1), 1)
        step = max(BLOCK_BYTES // size, 1)
        for start in range(0, self.shape[0] if self.numel else 0, step):
            yield start, min(start + step, self.shape[0])

    def blocks(self) -> Iterator[Tensor]:
        """The whole tensor in flat blocks, in C order; none for one without entries."""
        if not self.shape:
            yield self.pieces[0].view().reshape(1)
            return
        for start, stop in self.spans():
            yield self.rows(start, stop).reshape(-1)

    def same(self, other: StoredTensor) -> bool:
        """Whether the other is equal in dtype, shape and every entry."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(torch.equal(a, b) for a, b in zip(self.blocks(), other.blocks(), strict=True))
