"""Safetensors files written one tensor after the other: safetensors' own ``save_file`` needs all of a file at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from dpp_lightning.storage.mapped_file import DTYPES, METADATA
from dpp_lightning.tensors.fingerprint import raw_bytes

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """What a file's header says of one tensor.

    Attributes:
        name: any text but ``__metadata__``.
        dtype: one of ``DTYPES``.
        shape: lengths, each >= 0; ``()`` for a scalar.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes one safetensors file tensor by tensor, so that no two of them need be in memory together.

    The header goes out at once. Tensors lie in the file in the order of the entries, without gaps; entries of larger
    items first keep all of them aligned.

    Args:
        file: opened for writing; neither synced nor closed here.
        entries: all tensors of the file.
        metadata: text for the header.

    Raises:
        ValueError: a name twice or reserved, a dtype or shape the format lacks, a header too long, metadata that is
            not text.
        OSError: it cannot be written.
    """

    def __init__(self, file: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        self._file = file
        self._coming = iter(entries)
        self._entry: Entry | None = None
        self._missing = 0
        file.write(_header(entries, metadata or {}))
        self._advance()

    @property
    def complete(self) -> bool:
        """Whether all bytes that the entries declare have come."""
        return self._entry is None

    def write(self, data: Tensor | bytes | memoryview) -> None:
        """Append the next bytes, without a copy of what lies contiguous on the CPU.

        Args:
            data: the present entry's whole tensor, or a flat piece of it (tensor or bytes). A piece does not reach
                into the next entry; pieces without bytes are ignored.

        Raises:
            ValueError: more bytes than the entry has left, another dtype, or a tensor of another shape.
            OSError: it cannot be written.
        """
        entry = self._entry
        if isinstance(data, Tensor) and data.numel() and entry is not None and not _fits(data, entry):
            raise ValueError(
                f"expected {entry.name}, {entry.dtype} {entry.shape} or a flat piece of it, got {data.dtype} "
                f"{tuple(data.shape)}; write the tensors in the order of the entries"
            )
        view = raw_bytes(data) if isinstance(data, Tensor) else memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if len(view) > self._missing:
            left = "all tensors are complete" if entry is None else f"{entry.name} has {self._missing} left"
            raise ValueError(f"got {len(view)} bytes, but {left}; write each tensor once, in the order of the entries")
        self._missing -= len(view)
        while view:
            view = view[self._file.write(view) :]
        if not self._missing:
            self._advance()

    def close(self) -> None:
        """Flush the file.

        Raises:
            ValueError: bytes are missing.
            OSError: it cannot be written.
        """
        if self._entry is not None:
            raise ValueError(
                f"the file is incomplete: {self._missing} of the {self._entry.nbytes} bytes of {self._entry.name} "
                "have not come; write every entry before close()"
            )
        self._file.flush()

    def _advance(self) -> None:
        """On to the next entry that has bytes."""
        self._entry = next((entry for entry in self._coming if entry.nbytes), None)
        self._missing = self._entry.nbytes if self._entry else 0


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of tensors in memory, in their order, those of larger items first.

    safetensors' own ``save_file`` says of a full disk something that is no OSError.

    Args:
        path: of a file that is not there.
        tensors: of any layout and device.

    Raises:
        ValueError: as :class:`SafetensorsWriter`.
        OSError: it cannot be written, or is there already.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()]
    with path.open("xb") as file:
        writer = SafetensorsWriter(file, entries, {"format": "pt"})
        for tensor in ordered.values():
            writer.write(tensor)
        writer.close()


class ShardedWriter:
    """Writes the weights of a Hugging Face folder: one file, or shards and their index; as a context it closes itself.

    Args:
        folder: exists, holds no weights yet; whether it appears whole or not at all is the caller's concern
            (:func:`dpp_lightning.storage.atomic_write.atomic_folder`).
        entries: all tensors, put into shards in this order.
        max_shard_bytes: a shard is at most that long, except for a single tensor that is longer.

    Raises:
        ValueError: entries that :class:`SafetensorsWriter` refuses, or a limit below 1.
        OSError: the folder cannot be written, or has such a file already.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_shard_bytes: int = 5_000_000_000) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
        _header(entries, {})  # refuse now what a later shard would
        self._folder = folder
        shards = _shards(entries, max_shard_bytes)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        self._shards = dict(zip(names, shards, strict=True)) if len(shards) > 1 else {SINGLE_FILE: shards[0]}
        self._coming = iter(self._shards)
        self._open(next(self._coming))

    def write(self, data: Tensor | bytes | memoryview) -> None:
        """Append the next bytes over all entries; see :meth:`SafetensorsWriter.write`."""
        if self._writer.complete:
            self._next()
        self._writer.write(data)

    def close(self) -> None:
        """Finish the last file, and write the index if there are several.

        Raises:
            ValueError: bytes are missing.
            OSError: it cannot be written.
        """
        try:
            while self._writer.complete and self._next():
                pass
            self._writer.close()
        finally:
            self._file.close()
        if len(self._shards) > 1:
            weight_map = {entry.name: name for name, entries in self._shards.items() for entry in entries}
            size = sum(entry.nbytes for entries in self._shards.values() for entry in entries)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_bytes((json.dumps(index, indent=2) + "\n").encode())

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _open(self, name: str) -> None:
        self._file = (self._folder / name).open("xb")
        self._writer = SafetensorsWriter(self._file, self._shards[name], {"format": "pt"})

    def _next(self) -> bool:
        """Finish this shard and open the next; False if it was the last."""
        name = next(self._coming, None)
        if name is None:
            return False
        self._writer.close()
        self._file.close()
        self._open(name)
        return True


def _fits(data: Tensor, entry: Entry) -> bool:
    return data.dtype == entry.dtype and (data.dim() <= 1 or tuple(data.shape) == entry.shape)


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, a new shard wherever the next one would pass the limit; one empty shard for no entries."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and padding to a multiple of 8 bytes."""
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata must map text to text, got {dict(metadata)!r}")
    end = 0
    for entry in entries:
        if entry.name in header or entry.name == METADATA:
            raise ValueError(f"the name {entry.name!r} is {'reserved' if entry.name == METADATA else 'given twice'}")
        if entry.dtype not in _CODES:
            raise ValueError(f"{entry.name}: safetensors has no {entry.dtype}; expected one of {', '.join(DTYPES)}")
        if any(length < 0 for length in entry.shape):
            raise ValueError(f"{entry.name}: lengths must be at least 0, got shape {entry.shape}")
        offsets = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"a header of {len(text)} bytes is too long, at most {_LONGEST_HEADER}; use more shards")
    return len(text).to_bytes(8, "little") + text
