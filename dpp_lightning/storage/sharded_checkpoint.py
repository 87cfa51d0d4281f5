"""Sharded checkpoints: what ``torch.distributed.checkpoint`` (DCP) and with it Lightning's FSDPStrategy and
ModelParallelStrategy write, read by one process without a process group.

Such a folder holds ``*.distcp`` files, in them one small PyTorch file for every piece of every tensor, and
``.metadata``, which says which piece lies where (:mod:`dpp_lightning.storage.dcp_metadata`). No code in it is ever run.
"""

from __future__ import annotations

import io
import mmap
import tempfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.storage.dcp_metadata import CURE, METADATA_FILE, Key, Outline, Place, read_metadata
from dpp_lightning.storage.mapped_file import map_pages
from dpp_lightning.storage.stored_tensor import Piece, StoredTensor
from dpp_lightning.storage.torch_file import filled, outline
from dpp_lightning.tensors.fingerprint import raw_bytes

_EMBEDDINGS = ("embed", "wte", "shared")


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that ``torch.distributed.checkpoint`` wrote."""
    return (path / METADATA_FILE).is_file()


def read_sharded(folder: Path) -> dict[str, StoredTensor]:
    """The model's tensors in a sharded checkpoint; nothing of them is read yet.

    Optimizer states are left out, and where the checkpoint is a dict with a ``state_dict`` or ``model``, all but that.

    Args:
        folder: holds ``.metadata`` and the files that it names.

    Returns:
        Name in the model's state dict to tensor; tied ones come under each of their names.

    Raises:
        FileNotFoundError: files that ``.metadata`` names are missing.
        ValueError: a damaged ``.metadata``, files shorter than it says, or a checkpoint without tensors.
    """
    names, tensors, places = read_metadata(folder / METADATA_FILE)
    keys = [(name, at) for name in names for at in tensors[name].pieces]
    if lost := [f"{name} at {at}" for name, at in keys if (name, at) not in places]:
        raise ValueError(f"{folder / METADATA_FILE} does not say where {', '.join(lost[:10])} lie; {CURE}")
    files = _Files(folder, [places[key] for key in keys])
    return {new: _stored(name, tensors[name], places, files) for name, new in names.items()}


def load_sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of :func:`read_sharded` as whole ones: mapped where one piece is all, else put together.

    Those put together lie in a temporary file (in ``TMPDIR``) without a name, mapped, so that they take disk, not
    memory. A second name of a tied embedding shares its storage, as in a PyTorch file.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_sharded`.
        OSError: the temporary file cannot be written.
    """
    stored = read_sharded(folder)
    tensors = {name: t.pieces[0].view() for name, t in stored.items() if len(t.pieces) == 1}
    split = {name: t for name, t in stored.items() if len(t.pieces) > 1 and t.numel}
    tensors |= {n: torch.empty(t.shape, dtype=t.dtype) for n, t in stored.items() if not t.numel}
    if split:
        with tempfile.TemporaryFile() as file:
            starts = {}
            for name, tensor in split.items():
                file.seek(-file.tell() % 64, io.SEEK_CUR)
                starts[name] = file.tell()
                for block in tensor.blocks():
                    file.write(raw_bytes(block))
            file.flush()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, t in split.items():
            tensors[name] = torch.frombuffer(pages, dtype=t.dtype, count=t.numel, offset=starts[name]).view(t.shape)
    for name, first in _tied(stored).items():
        tensors[name] = tensors[first]
    return {name: tensors[name] for name in stored}


class _Files:
    """The mapped files of a folder, checked to be there and long enough."""

    def __init__(self, folder: Path, places: Iterable[Place]) -> None:
        ends: dict[str, int] = {}
        for place in places:
            ends[place.file] = max(ends.get(place.file, 0), place.start + place.length)
        missing = sorted(file for file in ends if not (folder / file).is_file())
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(ends)} files that {METADATA_FILE} names: "
                f"{', '.join(missing[:10])}; each rank writes its own, gather them in one folder"
            )
        short = [f for f, end in ends.items() if (folder / f).stat().st_size < end]
        if short:
            raise ValueError(f"{folder}: truncated, shorter than {METADATA_FILE} says: {', '.join(short[:10])}; {CURE}")
        self.folder = folder
        self._pages: dict[str, mmap.mmap] = {}

    def view(self, name: str, place: Place, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
        """The piece at a place."""
        if place.file not in self._pages:
            self._pages[place.file] = map_pages(self.folder / place.file)
        pages = self._pages[place.file]
        where = f"{self.folder / place.file}: the piece of {name} at {place.start}"
        try:
            part: Any = outline(io.BufferedReader(_Window(pages, place.start, place.length)))  # type: ignore[arg-type]
            tensor = filled({name: part}, pages, place.start)[name]
        except Exception as error:  # a damaged file ends in almost any type
            raise ValueError(f"{where} cannot be read ({error}); {CURE}") from error
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, sizes):
            raise ValueError(f"{where} is not the {dtype} {sizes} that {METADATA_FILE} says; {CURE}")
        return tensor.detach()


class _Window(io.RawIOBase):
    """A part of mapped pages as a file."""

    def __init__(self, pages: mmap.mmap, start: int, length: int) -> None:
        self._view = memoryview(pages)[start : start + length]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        self._at = max(origin + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _stored(name: str, about: Outline, places: Mapping[Key, Place], files: _Files) -> StoredTensor:
    pieces = [
        Piece(at, size, partial(files.view, name, places[name, at], about.dtype, size))
        for at, size in about.pieces.items()
    ]
    return StoredTensor(about.dtype, about.shape, pieces)


def _tied(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Further names of embeddings to the first: a matrix equal to an embedding is its tied head."""
    embeddings = [n for n, t in stored.items() if len(t.shape) == 2 and any(e in n for e in _EMBEDDINGS)]
    return {
        other: name
        for name in embeddings
        for other in stored
        if other not in embeddings and stored[name].numel and stored[name].same(stored[other])
    }
