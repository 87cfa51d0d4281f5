"""The table of a delta file: names, shapes and ranks of its tensors and names of those left alone, in one zstandard
frame of JSON, the blob ``table`` of ``delta_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import zstandard

from dpp_lightning.delta.coding.factor_stream import largest_rank, least_rank
from dpp_lightning.delta.contents import Table
from dpp_lightning.storage.safe_text import check_name
from dpp_lightning.tensors.factors import matrix_shape, stored_numbers

_LEVEL, _LEVEL_OF_LARGE, _LARGE = 19, 9, 1 << 19  # zstandard: the best, but of many experts' names it takes 10 s
_LESS = (1, -5, -20, -100)  # levels, from one to the next with more bytes
_MOST_BYTES = 1 << 24  # of the JSON: about 250,000 tensors
_RAW_BLOCK, _ONE_SEGMENT = 1 << 17, 0b10100000  # of a frame: most bytes of a block; a size of 4 bytes, no window
_MOST_SMALL, _MOST_RATIO = 1 << 16, 128  # regular names of 70,000 experts are compressed 100 times
_MOST_ENTRIES = 1 << 36  # of one tensor; a file that claims more is refused before any position is drawn
_MOST_DIMS = 16
_TYPES: dict[str, type] = {"tensors": list, "reverted": list, "unchanged": list, "names": dict}


@dataclass(frozen=True)
class TensorTable:
    """What the table says.

    Attributes:
        tensors: canonical name and shape of every pruned tensor, in the order of the chunks.
        ranks: of the factors of each of them, None without.
        reverted, unchanged, names: as of :class:`dpp_lightning.delta.contents.DeltaInfo`.
    """

    tensors: Table
    ranks: Sequence[int | None]
    reverted: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)

    @property
    def has_factors(self) -> bool:
        """Whether any tensor has factors."""
        return any(rank is not None for rank in self.ranks)

    @property
    def factor_numbers(self) -> list[int]:
        """How many numbers the factors of each tensor are."""
        return [
            0 if rank is None else stored_numbers(*matrix_shape(shape), rank)
            for (_, shape), rank in zip(self.tensors, self.ranks, strict=True)
        ]


def write_table(table: TensorTable, at_least: int = 0) -> bytes:
    """The blob's bytes.

    Args:
        table: what it says.
        at_least: bytes that it has, if need be by being compressed less or not at all; no more than 8 for each of the
            tensors.

    Raises:
        ValueError: names that no reader would take, or more of them than a file may have.
    """
    _check_names(table)
    rows = [
        [name, list(shape)] if rank is None else [name, list(shape), rank]
        for (name, shape), rank in zip(table.tensors, table.ranks, strict=True)
    ]
    fields: dict[str, Any] = {
        "tensors": rows,
        "reverted": list(table.reverted),
        "unchanged": list(table.unchanged),
        "names": table.names,
    }
    data = json.dumps({key: value for key, value in fields.items() if value}, separators=(",", ":")).encode()
    level = _LEVEL if len(data) < _LARGE else _LEVEL_OF_LARGE
    compressed = (zstandard.ZstdCompressor(level=tried).compress(data) for tried in (level, *_LESS))
    blob = next((blob for blob in compressed if len(blob) >= at_least), None) or _uncompressed(data)
    if len(data) > _most(len(blob)):
        raise ValueError(f"a delta of {len(rows):,} tensors, whose names and shapes are more than a file may have")
    return blob


def read_table(blob: bytes | memoryview) -> TensorTable:
    """What :func:`write_table` was given.

    Raises:
        ValueError: bytes that it does not write, before much memory is taken for them.
    """
    parsed = _parsed(blob)
    for key, value in parsed.items():
        if not isinstance(value, _TYPES.get(key, object)):
            raise ValueError(f"the table's {key} are {str(value)[:80]!r}")
    rows = list(_rows(parsed.get("tensors", [])))
    reverted, unchanged = (tuple(parsed.get(key, [])) for key in ("reverted", "unchanged"))
    names = parsed.get("names", {})
    if not all(isinstance(name, str) for name in (*reverted, *unchanged, *names.values())):
        raise ValueError("the table has names that are not text")
    tensors = [(name, shape) for name, shape, _ in rows]
    if len(dict(tensors)) != len(tensors):
        raise ValueError("the table names a tensor twice")
    table = TensorTable(tensors, [rank for _, _, rank in rows], reverted, unchanged, names)
    _check_names(table)
    return table


def _most(stored: int) -> int:
    """The most bytes of JSON that a frame of so many bytes may give."""
    return min(_MOST_BYTES, _MOST_SMALL + _MOST_RATIO * stored)


def _uncompressed(data: bytes) -> bytes:
    """A zstandard frame (RFC 8878) that states its size and holds the bytes as they are."""
    blocks = [data[start : start + _RAW_BLOCK] for start in range(0, len(data), _RAW_BLOCK)] or [b""]
    heads = [len(block) << 3 | (index == len(blocks) - 1) for index, block in enumerate(blocks)]  # raw; 1: the last
    frame = b"".join(head.to_bytes(3, "little") + block for head, block in zip(heads, blocks, strict=True))
    return zstandard.FRAME_HEADER + bytes([_ONE_SEGMENT]) + len(data).to_bytes(4, "little") + frame


def _parsed(blob: bytes | memoryview) -> dict[str, Any]:
    try:
        size = zstandard.frame_content_size(blob)
        if not 0 <= size <= _most(len(blob)):
            raise ValueError(f"a table of {len(blob)} bytes that states {size}, where {_most(len(blob))} are the most")
        data = zstandard.ZstdDecompressor().decompress(blob, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the table cannot be decompressed: {error}") from error
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the table is not readable JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("the table is no JSON object")
    return parsed


def _rows(rows: list[Any]) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    for row in rows:
        if not (isinstance(row, list) and len(row) in (2, 3) and isinstance(row[0], str) and isinstance(row[1], list)):
            raise ValueError(f"a row of the table is not [name, shape] or [name, shape, rank]: {str(row)[:80]}")
        name, shape, ranks = row[0], row[1], row[2:]
        whole = all(_is_whole(n) and n <= _MOST_ENTRIES for n in shape)
        if not whole or len(shape) > _MOST_DIMS or prod(shape) > _MOST_ENTRIES:
            raise ValueError(f"tensor {name!r} of the table has shape {str(shape)[:80]}")
        least, largest = least_rank(tuple(shape)), largest_rank(tuple(shape))
        if not all(_is_whole(rank) and least <= rank <= largest for rank in ranks):
            raise ValueError(f"tensor {name!r} of the table, of shape {shape}, has rank {str(ranks[0])[:80]}")
        yield name, tuple(shape), ranks[0] if ranks else None


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_names(table: TensorTable) -> None:
    listed = (name for name, _ in table.tensors)
    for name in (*listed, *table.reverted, *table.unchanged, *table.names, *table.names.values()):
        check_name(name)
