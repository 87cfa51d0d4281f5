"""Factors of many tensors as a line of chunks: the blob ``factors`` of a delta file.

The numbers of each factor are a tensor of one dimension of which every entry is kept, so that positions cost nothing
and no scale is shared by two factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import BinaryIO

import torch

from dpp_lightning.delta.coding.chunk import SEEDED_LEAST
from dpp_lightning.delta.coding.chunk_stream import ChunkReader, ChunkWriter
from dpp_lightning.delta.coding.positions import ALL, ByteArray
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor, Table
from dpp_lightning.tensors.dtypes import FLOATS
from dpp_lightning.tensors.factors import Factors, matrix_shape

_DEFAULT_DTYPE = "float32"


def largest_rank(shape: tuple[int, ...]) -> int:
    """The most that a file may state of a tensor: what any matrix of that shape has, and 1 of a single column."""
    rows, columns = matrix_shape(shape)
    return 1 if columns == 1 else min(rows, columns)


def least_rank(shape: tuple[int, ...]) -> int:
    """0, a product that adds nothing, and 1 of a single column."""
    return 1 if matrix_shape(shape)[1] == 1 else 0


class FactorWriter:
    """Appends the factors of tensors to a file of chunks; a context, as :class:`ChunkWriter`.

    Args:
        sink: where the chunks go.
        dtype: how the numbers are held, one of ``DTYPES``; None for float32.

    Attributes:
        ranks: of the factors of every tensor so far, None without.
    """

    def __init__(self, sink: BinaryIO, dtype: str | None) -> None:
        self.ranks: list[int | None] = []
        self._dtype = dtype or _DEFAULT_DTYPE
        self._chunks = ChunkWriter(sink, seeded=False, dtype=self._dtype, least=SEEDED_LEAST)

    def __enter__(self) -> FactorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chunks.__exit__(kind, error, trace)

    def add(self, name: str, shape: tuple[int, ...], factors: Factors | None) -> None:
        """The next tensor's.

        Args:
            name: of the tensor.
            shape: of the tensor.
            factors: the tensor's, or None.

        Raises:
            ValueError: factors that do not multiply to the shape, of a rank that no reader takes, or numbers that are
                not finite in the dtype.
        """
        self.ranks.append(None if factors is None else factors.rank)
        if factors is None:
            return
        if not least_rank(shape) <= factors.rank <= largest_rank(shape):
            possible = f"{least_rank(shape)} to {largest_rank(shape)}"
            raise ValueError(f"{name}: factors of rank {factors.rank}, where {possible} are possible")
        if (len(factors.left), factors.right.shape[1]) != matrix_shape(shape):
            raise ValueError(f"{name}: factors of {len(factors.left)} × {factors.right.shape[1]} for {list(shape)}")
        for numbers in factors.rounded(self._dtype, name).stored():
            held = numbers.detach().cpu().to(FLOATS.get(self._dtype, torch.float32))
            every = torch.arange(held.numel(), dtype=torch.int64)
            self._chunks.add(name, SparseTensor((held.numel(),), every, held))

    def close(self) -> None:
        """Write what is left."""
        self._chunks.close()


class FactorReader:
    """Reads the chunks of factors.

    Args:
        blob: all chunks, shape (bytes,).
        table: name and shape of every tensor, in order.
        ranks: of the factors of every tensor, from :func:`least_rank` to :func:`largest_rank`, None without.
        info: says how the numbers are held.

    Attributes:
        chunks: of the numbers, a tensor for each factor; heads are read and checked here.
        owners: index in ``table`` for each of these tensors.

    Raises:
        ValueError: heads that :class:`FactorWriter` does not write.
    """

    def __init__(self, blob: ByteArray, table: Table, ranks: Sequence[int | None], info: DeltaInfo) -> None:
        self.table, self.ranks = table, ranks
        self.owners: list[int] = []
        lines: Table = []
        for index, ((name, shape), rank) in enumerate(zip(table, ranks, strict=True)):
            rows, columns = matrix_shape(shape)
            sizes = [] if rank is None else [rank * rows] if columns == 1 else [rank * rows, rank * columns]
            lines += [(name, (size,)) for size in sizes]
            self.owners += [index] * len(sizes)
        held = replace(info, dtype=info.factors_dtype or _DEFAULT_DTYPE)
        self.chunks = ChunkReader(blob, lines, held, seeded=False)
        for _, head in self.chunks.heads:
            if head.coding != ALL or head.kept != head.span:
                raise ValueError(f"a chunk of factors that states {head.kept} of {head.span} numbers")

    def factors(self) -> Iterator[Factors | None]:
        """Those of every tensor in the table's order, float32.

        Raises:
            ValueError: bytes that :class:`FactorWriter` does not write.
        """
        lines = self.chunks.tensors()
        for (_, shape), rank in zip(self.table, self.ranks, strict=True):
            if rank is None:
                yield None
                continue
            stored = [next(lines)[1].values.float()]
            if matrix_shape(shape)[1] != 1:
                stored.append(next(lines)[1].values.float())
            yield Factors.from_stored(shape, rank, stored)
