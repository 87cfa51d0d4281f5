"""Kept entries of many tensors as a line of chunks, written and read tensor by tensor in bounded memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from math import prod, sqrt
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.delta.coding.chunk import (
    CHUNK_KEPT,
    CHUNK_LEAST,
    SEEDED_LEAST,
    Chunk,
    Head,
    decode_chunk,
    encode_chunk,
    read_head,
)
from dpp_lightning.delta.coding.limits import memory_of, most_blocks, most_memory
from dpp_lightning.delta.coding.positions import ByteArray, Int64Array
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor, Table
from dpp_lightning.sampling.sampler import BLOCK, kept_positions_of
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS
from dpp_lightning.tensors.factors import matrix_shape

_MOST_TOTAL = 1 << 42  # entries of all tensors: more than any model has, few enough to draw from in seconds


class UndrawableError(ValueError):
    """Positions that follow from a seed, so few in so many entries that no reader would draw them."""


class ChunkWriter:
    """Appends tensors to a file of chunks, each encoded and written in a thread while the next tensors are made.

    As a context it ends that thread, after an error too.

    Args:
        sink: where the chunks go.
        seeded: positions follow from the seed and are not stored.
        dtype: an integer dtype to store values so; otherwise each tensor's own dtype is kept.
        rest: the seed draws from tensors with factors too, but for those that these hold whole.
        least: kept entries that a chunk has at least, but for the last; None for what suits the positions.

    Attributes:
        table: name and shape of every tensor so far.
        stored: bytes of all chunks so far.
    """

    def __init__(
        self, sink: BinaryIO, *, seeded: bool, dtype: str | None, rest: bool = False, least: int | None = None
    ) -> None:
        self.sink, self.seeded, self.dtype, self._rest = sink, seeded, dtype, rest
        self.least = least or (SEEDED_LEAST if seeded else CHUNK_LEAST)
        self.table: Table = []
        self._positions: list[Int64Array] = []
        self._values: list[Tensor] = []
        self._chunk_dtype, self._span, self._kept = "float32", 0, 0
        self.stored, self._memory = 0, 0  # bytes of all chunks so far, in the file and when they are read
        self._blocks = 0  # of the sampler, in all tensors so far
        self._pool, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def add(self, name: str, tensor: SparseTensor) -> None:
        """The next tensor; its factors are not written here.

        Raises:
            ValueError: kept entries beside factors, where positions follow from the seed.
        """
        self.table.append((name, tensor.shape))
        values = tensor.values.detach().cpu()
        indices = tensor.indices.cpu().numpy()
        if len(indices):  # a tensor without kept entries goes with any dtype
            dtype = self.dtype if self.dtype in INTEGERS else str(values.dtype).removeprefix("torch.")
            if self._kept and dtype != self._chunk_dtype:
                self._flush()
            self._chunk_dtype = dtype or ""
        numel, kept, begin = prod(tensor.shape), len(indices), 0
        if self.seeded and not _is_drawn(tensor.shape, tensor.factors is not None, self._rest):
            if kept:
                raise ValueError(f"{name} has kept entries beside factors, which no seed draws: give positions='index'")
            numel = 0
        self._blocks += -(-numel // BLOCK)
        for first in range(0, max(kept, 1), CHUNK_KEPT):
            last = min(first + CHUNK_KEPT, kept)
            end = int(indices[last - 1]) + 1 if last < kept else numel
            self._positions.append(indices[first:last].astype(np.int64) + (self._span - begin))
            if last > first:
                self._values.append(values[first:last])
            self._span, self._kept = self._span + end - begin, self._kept + last - first
            begin = end
            if self._kept >= self.least:
                self._flush()

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: the file cannot be written.
            UndrawableError: positions that follow from a seed, too many entries for so few bytes.
        """
        if self._span:
            self._flush()
        self._writing.result()
        if self.seeded and self._blocks > most_blocks(self.stored):
            raise UndrawableError(
                f"a seed that draws from {self._blocks:,} blocks for {self.stored:,} bytes: give positions='index'"
            )

    def _flush(self) -> None:
        self._writing.result()  # one at a time, in order
        chunk = self._span, self._positions, self._values, self._chunk_dtype, self._kept
        self._writing = self._pool.submit(self._write, *chunk)
        self._positions, self._values, self._span, self._kept = [], [], 0, 0

    def _write(self, span: int, positions: list[Int64Array], values: list[Tensor], chunk_dtype: str, kept: int) -> None:
        encode = partial(encode_chunk, span, np.concatenate(positions), values, chunk_dtype, seeded=self.seeded)
        data = encode()
        self._memory += memory_of(kept, chunk_dtype)
        if self._memory > most_memory(self.stored + len(data)):
            data = encode(compressed=False)
        self.stored += len(data)
        self.sink.write(data)


class ChunkReader:
    """Reads the chunks of a delta file.

    Args:
        blob: all chunks, shape (bytes,).
        table: name and shape of every tensor, in order.
        info: dtype, rate and seed, for positions that are not stored, and whether a rest is drawn beside factors.
        seeded: positions follow from the seed.
        ranks: of the factors of every tensor, None without.

    Attributes:
        heads: first entry and head of every chunk; all are read and checked here, which takes no memory to speak of,
            as is the memory that the entries will take.

    Raises:
        ValueError: heads that :class:`ChunkWriter` does not write, or a table of more entries than can be counted.
    """

    def __init__(
        self, blob: ByteArray, table: Table, info: DeltaInfo, *, seeded: bool, ranks: Sequence[int | None] | None = None
    ) -> None:
        self.blob, self.table, self.info, self.seeded = blob, table, info, seeded
        self._rate = info.pruning_rate if info.drawn_rate is None else info.drawn_rate
        self._sizes = [prod(shape) for _, shape in table]
        self._drawn_sizes = [
            0 if seeded and not _is_drawn(shape, rank is not None, info.rest) else size
            for size, (_, shape), rank in zip(self._sizes, table, ranks or [None] * len(table), strict=True)
        ]
        self._offsets = [0, *accumulate(self._drawn_sizes)]
        if sum(self._sizes) > _MOST_TOTAL:
            raise ValueError(f"tensors of {sum(self._sizes)} entries in all")
        blocks = sum(-(-size // BLOCK) for size in self._drawn_sizes)
        if seeded and blocks > most_blocks(len(blob)):
            raise ValueError(f"a seed that draws from {blocks:,} blocks for {len(blob):,} bytes of chunks")
        self.heads = list(self._heads())
        # of all tensors without kept entries
        self._no_values = torch.empty(0, dtype=FLOATS[info.dtype if info.dtype in FLOATS else "float32"])
        self._no_indices, self._no_wide_indices = (torch.empty(0, dtype=t) for t in (torch.int32, torch.int64))

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Index in the table of the first tensor that a chunk touches, and the chunk.

        Raises:
            ValueError: bytes that :class:`ChunkWriter` does not write.
        """
        drawn = self._drawn() if self.seeded else None
        for begin, head in self.heads:
            bounds = self._bounds(begin, head.span)
            yield bounds[0][0], decode_chunk(self.blob, head, partial(self._local_positions, bounds, begin, drawn))

    def tensors(self) -> Iterator[tuple[str, SparseTensor]]:
        """Name and kept entries of every tensor in the table's order; errors as :meth:`chunks`."""
        done, pieces = 0, list[tuple[Tensor, Tensor]]()  # tensors yielded; (indices, values) of the next one so far
        for first, chunk in self.chunks():
            chunk_values = chunk.values.split([len(positions) for positions in chunk.positions])
            for index, (positions, values) in enumerate(zip(chunk.positions, chunk_values, strict=True), first):
                while done < index:
                    yield self._whole(done, pieces)
                    done, pieces = done + 1, []
                if len(positions):
                    pieces.append((self._indices(index, positions), values))
        for index in range(done, len(self.table)):
            yield self._whole(index, pieces)
            pieces = []

    def _heads(self) -> Iterator[tuple[int, Head]]:
        position, begin, total, memory = 0, 0, self._offsets[-1], 0
        while begin < total:
            head = read_head(self.blob, position, total - begin, seeded=self.seeded)
            stated = self.info.dtype or (head.dtype if head.dtype in FLOATS else "their own dtype")
            if head.kept and head.dtype != stated:
                raise ValueError(f"a chunk of {head.dtype} values in a delta that holds them in {stated}")
            if self.seeded:
                self._check_count(head)
            memory += memory_of(head.kept, head.dtype)
            if memory > (most := most_memory(len(self.blob))):
                raise ValueError(
                    f"{len(self.blob):,} bytes of chunks that ask for {memory:,} of memory, {most:,} at most"
                )
            yield begin, head
            position, begin = head.stop, begin + head.span
        if position != len(self.blob):
            raise ValueError(f"{len(self.blob) - position} bytes follow the last chunk")

    def _check_count(self, head: Head) -> None:
        """Refuse, before any is drawn, a number of kept entries that no seed can give."""
        p = self._rate
        if abs(head.kept - head.span * (1 - p)) > 40 + 40 * sqrt(head.span * p * (1 - p)):
            raise ValueError(f"no seed keeps {head.kept} of {head.span} entries at rate {p}")

    def _whole(self, index: int, pieces: list[tuple[Tensor, Tensor]]) -> tuple[str, SparseTensor]:
        """Name and kept entries of the tensor at an index of the table, put together from what its chunks hold."""
        name, shape = self.table[index]
        if len(pieces) == 1:
            return name, SparseTensor(shape, *pieces[0])
        if not pieces:
            wide = self._sizes[index] >= 2**31
            return name, SparseTensor(shape, self._no_wide_indices if wide else self._no_indices, self._no_values)
        return name, SparseTensor(shape, torch.cat([i for i, _ in pieces]), torch.cat([v for _, v in pieces]))

    def _indices(self, index: int, positions: Int64Array) -> Tensor:
        """Positions as int32 where the tensor is small enough for that."""
        return torch.from_numpy(positions if self._sizes[index] >= 2**31 else positions.astype(np.int32))

    def _bounds(self, begin: int, span: int) -> list[tuple[int, int, int]]:
        """(index, start, stop) of every tensor that [begin, begin + span) touches, start and stop within it."""
        first = bisect_right(self._offsets, begin) - 1
        last = bisect_right(self._offsets, begin + span - 1) - 1
        return [
            (i, max(begin - self._offsets[i], 0), min(begin + span - self._offsets[i], self._drawn_sizes[i]))
            for i in range(first, last + 1)
        ]

    def _local_positions(
        self,
        bounds: list[tuple[int, int, int]],
        begin: int,
        drawn: Callable[[int], Int64Array] | None,
        stored: Int64Array | None,
    ) -> list[Int64Array]:
        """Positions in each tensor that a chunk touches."""
        if drawn is not None:
            return [_between(drawn(i), start, stop, self._drawn_sizes[i]) for i, start, stop in bounds]
        assert stored is not None
        ends = np.searchsorted(stored, [self._offsets[i] + stop - begin for i, _, stop in bounds])
        pieces = np.split(stored, ends[:-1])
        return [piece - (self._offsets[i] - begin) for piece, (i, _, _) in zip(pieces, bounds, strict=True)]

    def _drawn(self) -> Callable[[int], Int64Array]:
        """Index in the table to the sampler's positions, for indices that never go back."""
        names = (name for name, _ in self.table)
        coming = enumerate(kept_positions_of(zip(names, self._drawn_sizes, strict=True), self._rate, self.info.seed))
        current = (-1, np.empty(0, np.int64))

        def positions(index: int) -> Int64Array:
            nonlocal current
            while current[0] < index:
                current = next(coming)
            return current[1]

        return positions


def _is_drawn(shape: tuple[int, ...], has_factors: bool, rest: bool) -> bool:
    """Whether a seed draws from a tensor: beside factors where a rest is kept and they do not hold the tensor whole."""
    return not has_factors or (rest and matrix_shape(shape)[1] > 1)


def _between(positions: Int64Array, start: int, stop: int, numel: int) -> Int64Array:
    if stop - start == numel:
        return positions
    first, last = np.searchsorted(positions, (start, stop))
    return positions[first:last]
