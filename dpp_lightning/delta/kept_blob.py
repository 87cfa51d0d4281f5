"""The blob ``kept`` written: positions left to the seed where a reader would draw them, else stored."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import BinaryIO

from dpp_lightning.delta.coding.chunk_stream import ChunkWriter, UndrawableError
from dpp_lightning.delta.coding.factor_stream import FactorWriter
from dpp_lightning.delta.coding.limits import most_blocks
from dpp_lightning.delta.contents import DeltaContents, SparseTensor, Table
from dpp_lightning.sampling.sampler import BLOCK


def write_kept(
    kept: BinaryIO,
    factors: FactorWriter,
    contents: DeltaContents,
    *,
    seeded: bool,
    dtype: str | None,
    rest: bool,
    seed_only: bool = False,
) -> tuple[Table, bool]:
    """Write the kept entries of all tensors, and their factors.

    A reader refuses to draw from very many tensors, or entries, for few bytes, see
    :mod:`dpp_lightning.delta.coding.limits`. How many bytes there will be is known at the end, so until there are
    enough the entries are held in memory, to be written once more with their positions.

    Args:
        kept: an empty file, for the chunks.
        factors: takes the factors; closed here.
        contents: all tensors are read once.
        seeded: leave positions to the seed, if a reader would draw them.
        dtype, rest: as of ``DeltaInfo``.
        seed_only: never store positions that could be left to the seed.

    Returns:
        Name and shape of every tensor, and whether positions were left to the seed.

    Raises:
        UndrawableError: no reader would draw the positions, and ``seed_only`` is true.
        ValueError: kept entries beside factors, where positions follow from the seed.
        OSError: it cannot be written.
    """
    blocks = sum(-(-prod(shape) // BLOCK) for _, shape in contents.table)
    held: list[tuple[str, SparseTensor]] = []
    with ChunkWriter(kept, seeded=seeded, dtype=dtype, rest=rest) as chunks:
        enough = not seeded or seed_only or blocks <= most_blocks(0)
        for name, tensor in contents.tensors():
            chunks.add(name, tensor)
            factors.add(name, tensor.shape, tensor.factors)
            if not enough:
                held.append((name, replace(tensor, factors=None)))
                enough = blocks <= most_blocks(chunks.stored)
                if enough:
                    held.clear()
        factors.close()
        try:
            chunks.close()
            return chunks.table, seeded
        except UndrawableError:
            if seed_only:
                raise
            kept.seek(0)
            kept.truncate()
    with ChunkWriter(kept, seeded=False, dtype=dtype) as chunks:
        for name, tensor in held:
            chunks.add(name, tensor)
        chunks.close()
    return chunks.table, False
