"""Factors: a matrix as the product of two thin ones, delta = left @ right, which are far fewer numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dpp_lightning.tensors.dtypes import to_dtype


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix that factors of a tensor multiply to: the first dimension and all others.

    A convolution's kernel (out, in, height, width) is one of out rows; a vector has one column.
    """
    return (shape[0] if shape else 1), prod(shape[1:])


@dataclass(frozen=True)
class Factors:
    """The part of a tensor's delta that is ``left @ right``, in C order of :func:`matrix_shape`.

    The delta of a vector, or of another tensor of one column, is held whole: its right factor is the number 1, and is
    not stored.

    Attributes:
        left: shape (rows, rank), float32.
        right: shape (rank, columns), float32.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def whole(cls, values: Tensor) -> Factors:
        """All entries of a tensor of one column, such as a bias.

        Args:
            values: its delta, any shape.
        """
        return cls(values.reshape(-1, 1).float(), torch.ones(1, 1))

    @property
    def rank(self) -> int:
        """Number of columns of ``left``, and of rows of ``right``."""
        return self.left.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether the tensor has one column, so that only ``left`` is stored."""
        return self.right.shape[1] == 1

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return stored_numbers(self.left.shape[0], self.right.shape[1], self.rank)

    def product(self) -> Tensor:
        """``left @ right`` as one line of entries in C order, float32, shape (rows * columns,)."""
        return (self.left.float() @ self.right.float()).reshape(-1)

    def entries(self, start: int, stop: int) -> Tensor:
        """The product's entries from one flat position to another, in C order, float32, shape (stop - start,)."""
        columns = self.right.shape[1]
        first = start // columns
        rows = self.left[first : -(-stop // columns)].float() @ self.right.float()
        return rows.reshape(-1)[start - first * columns : stop - first * columns]

    def stored(self) -> list[Tensor]:
        """What a file holds, each of shape (numbers,): the columns of ``left`` one after the other, the rows of
        ``right``, so that numbers that share a scale belong to one direction where these are as many."""
        columns = self.left.t().reshape(-1).contiguous()
        return [columns] if self.is_whole else [columns, self.right.reshape(-1).contiguous()]

    @classmethod
    def from_stored(cls, shape: tuple[int, ...], rank: int, stored: list[Tensor]) -> Factors:
        """The inverse of :meth:`stored`.

        Args:
            shape: of the tensor.
            rank: of the factors; 1 for a tensor of one column.
            stored: as :meth:`stored` gives them.
        """
        rows, columns = matrix_shape(shape)
        left = stored[0].view(rank, rows).t()
        return cls(left, torch.ones(1, 1) if columns == 1 else stored[1].view(rank, columns))

    def rounded(self, dtype: str | None, name: str = "factors") -> Factors:
        """The factors as a file of that dtype holds them, in float32.

        Raises:
            ValueError: numbers that are not finite in that dtype.
        """
        if dtype is None:
            return self
        shape = (self.left.shape[0], self.right.shape[1])
        held = [to_dtype(numbers.float(), dtype, numbers, name).float() for numbers in self.stored()]
        return Factors.from_stored(shape, self.rank, held)

    def scaled(self, factor: float) -> Factors:
        """The factors of that multiple of the product."""
        return Factors(self.left * factor, self.right)


def stored_numbers(rows: int, columns: int, rank: int) -> int:
    """How many numbers the factors of a matrix are: rank (rows + columns), and the rows alone of one column."""
    return rank * (rows + columns) if columns > 1 else rows


def joined(parts: list[Factors]) -> Factors:
    """Factors of the sum of the products, their ranks added; those of a tensor of one column stay whole."""
    if parts[0].is_whole:
        return Factors(torch.stack([part.left for part in parts]).sum(0), parts[0].right)
    return Factors(torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts]))
