"""Sharded checkpoints: what ``torch.distributed.checkpoint`` (DCP) and with it Lightning's FSDPStrategy and
ModelParallelStrategy write, read by one process without a process group.

Such a folder holds ``*.distcp`` files, in them one small PyTorch file for every piece of every tensor, and
``.metadata``, which says which tensors there are, in which pieces, and where each piece lies
(:mod:`dpp_lightning.storage.checkpoint_metadata`). No code in such a folder is ever run.
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

from dpp_lightning.storage.checkpoint_metadata import (
    CURE,
    METADATA_FILE,
    FileSpan,
    PieceKey,
    TensorLayout,
    read_metadata,
)
from dpp_lightning.storage.mapped_file import fill_outline, load_outline, map_pages
from dpp_lightning.storage.stored_tensor import Piece, StoredTensor
from dpp_lightning.tensors.fingerprint import raw_bytes

_EMBEDDINGS = ("embed", "wte", "shared")


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that ``torch.distributed.checkpoint`` wrote."""
    return (path / METADATA_FILE).is_file()


def is_complete(checkpoint: Path) -> bool:
    """Whether Lightning wrote a checkpoint to its end: a file appears whole, a folder gets ``meta.pt`` last."""
    return checkpoint.is_file() or (checkpoint / "meta.pt").is_file()


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
    names, layouts, spans = read_metadata(folder)
    keys = [(name, offsets) for name in names for offsets in layouts[name].pieces]
    if lost := [f"{name} at {offsets}" for name, offsets in keys if (name, offsets) not in spans]:
        raise ValueError(f"{folder / METADATA_FILE} does not say where {', '.join(lost[:10])} lie; {CURE}")
    files = _Files(folder, [spans[key] for key in keys])
    return {model_name: _stored(name, layouts[name], spans, files) for name, model_name in names.items()}


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
    in_pieces = {name: t for name, t in stored.items() if len(t.pieces) > 1 and t.numel}
    tensors |= {n: torch.empty(t.shape, dtype=t.dtype) for n, t in stored.items() if not t.numel}
    if in_pieces:
        with tempfile.TemporaryFile() as file:
            starts = {}
            for name, tensor in in_pieces.items():
                file.seek(-file.tell() % 64, io.SEEK_CUR)
                starts[name] = file.tell()
                for block in tensor.blocks():
                    file.write(raw_bytes(block))
            file.flush()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, t in in_pieces.items():
            tensors[name] = torch.frombuffer(pages, dtype=t.dtype, count=t.numel, offset=starts[name]).view(t.shape)
    for name, embedding in _tied_heads(stored).items():
        tensors[name] = tensors[embedding]
    return {name: tensors[name] for name in stored}


class _Files:
    """The mapped files of a folder, checked to be there and long enough."""

    def __init__(self, folder: Path, spans: Iterable[FileSpan]) -> None:
        ends: dict[str, int] = {}
        for span in spans:
            ends[span.file] = max(ends.get(span.file, 0), span.start + span.length)
        missing = sorted(file for file in ends if not (folder / file).is_file())
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(ends)} files that {METADATA_FILE} names: "
                f"{', '.join(missing[:10])}; each rank writes its own, gather them in one folder"
            )
        short = [f for f, end in ends.items() if (folder / f).stat().st_size < end]
        if short:
            listed = ", ".join(short[:10])
            raise ValueError(f"{folder}: truncated, shorter than {METADATA_FILE} says: {listed}; {CURE}")
        self.folder = folder
        self._pages: dict[str, mmap.mmap] = {}

    def view(self, name: str, span: FileSpan, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
        """The piece of a tensor that lies there, as a view of the mapped file."""
        if span.file not in self._pages:
            self._pages[span.file] = map_pages(self.folder / span.file)
        pages = self._pages[span.file]
        where = f"{self.folder / span.file}: the piece of {name} at {span.start}"
        try:
            outline: Any = load_outline(io.BufferedReader(_Window(pages, span.start, span.length)))  # type: ignore[arg-type]
            tensor = fill_outline({name: outline}, pages, span.start)[name]
        except Exception as error:  # a damaged file ends in almost any type
            raise ValueError(f"{where} cannot be read ({error}); {CURE}") from error
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, sizes):
            raise ValueError(f"{where} is not the {dtype} {sizes} that {METADATA_FILE} says; {CURE}")
        return tensor.detach()


class _Window(io.RawIOBase):
    """A stretch of mapped pages as a file of its own."""

    def __init__(self, pages: mmap.mmap, start: int, length: int) -> None:
        self._view = memoryview(pages)[start : start + length]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}[whence]
        self._position = max(origin + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._view[self._position : self._position + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _stored(name: str, layout: TensorLayout, spans: Mapping[PieceKey, FileSpan], files: _Files) -> StoredTensor:
    pieces = [
        Piece(offsets, sizes, partial(files.view, name, spans[name, offsets], layout.dtype, sizes))
        for offsets, sizes in layout.pieces.items()
    ]
    return StoredTensor(layout.dtype, layout.shape, pieces)


def _tied_heads(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name of a matrix that equals an embedding, and so is the head tied to it, to the embedding's name."""
    embeddings = [n for n, t in stored.items() if len(t.shape) == 2 and any(e in n for e in _EMBEDDINGS)]
    return {
        name: embedding
        for embedding in embeddings
        for name in stored
        if name not in embeddings and stored[embedding].numel and stored[embedding].same(stored[name])
    }
