"""Sharded checkpoints: what ``torch.distributed.checkpoint`` (DCP) and with it Lightning's FSDPStrategy and
ModelParallelStrategy write, read by one process without a process group.

Such a folder holds ``*.distcp`` files, in them one small PyTorch file for every piece of every tensor, and
``.metadata``, which says which tensors there are, in which pieces, and where each piece lies. That file is a pickle,
which torch's own reader unpickles as it is, so that a hostile one runs any code. Here it is read by an unpickler that
knows sizes and dtypes; every other class becomes a record of plain values. No code in such a folder is ever run.
"""

from __future__ import annotations

import io
import mmap
import pickle
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.storage.mapped_file import fill_outline, load_outline, map_pages
from dpp_lightning.storage.stored_tensor import Piece, StoredTensor
from dpp_lightning.tensors.fingerprint import raw_bytes

_METADATA_FILE = ".metadata"
_CURE = "copy the whole folder again, or save the checkpoint again"
_MODEL_KEYS = frozenset({"state_dict", "model", "module", "model_state_dict"})
_EMBEDDINGS = ("embed", "wte", "shared")

_Offsets = tuple[int, ...]  # where a piece begins in its tensor, by dimension
_PieceKey = tuple[str, _Offsets]  # name of a tensor in the checkpoint, and the piece


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that ``torch.distributed.checkpoint`` wrote."""
    return (path / _METADATA_FILE).is_file()


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
    names, layouts, spans = _read_metadata(folder / _METADATA_FILE)
    keys = [(name, offsets) for name in names for offsets in layouts[name].pieces]
    if lost := [f"{name} at {offsets}" for name, offsets in keys if (name, offsets) not in spans]:
        raise ValueError(f"{folder / _METADATA_FILE} does not say where {', '.join(lost[:10])} lie; {_CURE}")
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


@dataclass(frozen=True)
class _TensorLayout:
    """A tensor as the metadata describes it.

    Attributes:
        dtype, shape: of the whole.
        pieces: offsets to sizes of the rectangles that hold its entries; empty ones are left out.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Mapping[_Offsets, tuple[int, ...]]


@dataclass(frozen=True)
class _FileSpan:
    """Where the PyTorch file of one piece lies: in which file of the folder, from which byte, how many bytes."""

    file: str
    start: int
    length: int


class _Files:
    """The mapped files of a folder, checked to be there and long enough."""

    def __init__(self, folder: Path, spans: Iterable[_FileSpan]) -> None:
        ends: dict[str, int] = {}
        for span in spans:
            ends[span.file] = max(ends.get(span.file, 0), span.start + span.length)
        missing = sorted(file for file in ends if not (folder / file).is_file())
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(ends)} files that {_METADATA_FILE} names: "
                f"{', '.join(missing[:10])}; each rank writes its own, gather them in one folder"
            )
        short = [f for f, end in ends.items() if (folder / f).stat().st_size < end]
        if short:
            listed = ", ".join(short[:10])
            raise ValueError(f"{folder}: truncated, shorter than {_METADATA_FILE} says: {listed}; {_CURE}")
        self.folder = folder
        self._pages: dict[str, mmap.mmap] = {}

    def view(self, name: str, span: _FileSpan, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
        """The piece of a tensor that lies there, as a view of the mapped file."""
        if span.file not in self._pages:
            self._pages[span.file] = map_pages(self.folder / span.file)
        pages = self._pages[span.file]
        where = f"{self.folder / span.file}: the piece of {name} at {span.start}"
        try:
            outline: Any = load_outline(io.BufferedReader(_Window(pages, span.start, span.length)))  # type: ignore[arg-type]
            tensor = fill_outline({name: outline}, pages, span.start)[name]
        except Exception as error:  # a damaged file ends in almost any type
            raise ValueError(f"{where} cannot be read ({error}); {_CURE}") from error
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, sizes):
            raise ValueError(f"{where} is not the {dtype} {sizes} that {_METADATA_FILE} says; {_CURE}")
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


def _stored(name: str, layout: _TensorLayout, spans: Mapping[_PieceKey, _FileSpan], files: _Files) -> StoredTensor:
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


def _read_metadata(path: Path) -> tuple[dict[str, str], dict[str, _TensorLayout], dict[_PieceKey, _FileSpan]]:
    """What the file says.

    Returns:
        (name in the checkpoint to name in the model's state dict, for the model's tensors alone; name in the
        checkpoint to layout; piece to where it lies).

    Raises:
        ValueError: damaged, not such a file, or without tensors of a model.
    """
    metadata = _unpickle(path)
    try:
        layouts = _tensor_layouts(metadata)
        return _model_names(layouts, metadata.get("planner_data")), layouts, _file_spans(metadata)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not describe a checkpoint ({error!r}); {_CURE}") from error


class _Record:
    """What an unpickled object of any class becomes: its state, kept and never acted on."""

    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def ignore(self, *args: Any) -> None:
        """Take what a list or dict would take."""

    append = extend = add = __setitem__ = ignore


class _Unpickler(pickle.Unpickler):
    """Sizes, dtypes and dicts are themselves, all else is a :class:`_Record`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _Record


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            state = getattr(_Unpickler(file).load(), "state", None)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle ends in almost any type
        raise ValueError(f"{path} cannot be read ({error!r}); {_CURE}") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict_metadata"), dict):
        raise ValueError(f"{path} is not the metadata of a torch.distributed.checkpoint; {_CURE}")
    return state


def _tensor_layouts(metadata: Mapping[str, Any]) -> dict[str, _TensorLayout]:
    layouts = {}
    for name, record in metadata["state_dict_metadata"].items():
        if not isinstance(record.state, dict) or "chunks" not in record.state:
            continue  # not a tensor
        properties = record.state["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        shape = tuple(record.state["size"])
        sizes = {tuple(c.state["offsets"]): tuple(c.state["sizes"]) for c in record.state["chunks"]}
        held = sum(map(prod, sizes.values()))
        inside = all(len(offsets) == len(size) == len(shape) for offsets, size in sizes.items()) and all(
            0 <= o <= o + s <= n
            for offsets, size in sizes.items()
            for o, s, n in zip(offsets, size, shape, strict=True)
        )
        if not isinstance(dtype, torch.dtype) or not inside or held != prod(shape):
            raise ValueError(
                f"{_METADATA_FILE}: the pieces of {name} hold {held} of its {prod(shape)} entries; {_CURE}"
            )
        layouts[name] = _TensorLayout(dtype, shape, {offsets: size for offsets, size in sizes.items() if prod(size)})
    return layouts


def _file_spans(metadata: Mapping[str, Any]) -> dict[_PieceKey, _FileSpan]:
    spans = {}
    for index, info in metadata["storage_data"].items():
        if index.state.get("offset") is None:
            continue  # not a tensor
        storage = info.state
        if storage.get("transform_descriptors"):
            raise ValueError(
                f"the checkpoint is compressed ({storage['transform_descriptors']}), which is not read here; save it "
                "without extensions"
            )
        file, start, length = storage["relative_path"], storage["offset"], storage["length"]
        outside = file.startswith(("/", "\\")) or ".." in PureWindowsPath(file).parts or PureWindowsPath(file).drive
        if outside or "\0" in file or start < 0 or length < 0:
            raise ValueError(f"{_METADATA_FILE}: expected files inside the folder, got {file!r} at {start}; {_CURE}")
        spans[index.state["fqn"], tuple(index.state["offset"])] = _FileSpan(file, start, length)
    return spans


def _model_names(names: Iterable[str], key_paths: Mapping[str, Any] | None) -> dict[str, str]:
    """Of all names in the checkpoint those of the model's tensors, each with its name in the model.

    Args:
        names: in the checkpoint, in which the keys of nested dicts are joined by dots.
        key_paths: name to these keys, if the checkpoint says them.
    """
    split = {}
    for name in names:
        first, _, rest = name.partition(".")
        given = key_paths.get(name) if isinstance(key_paths, Mapping) else None
        keys = [str(key) for key in given] if given else [first, rest] if first in _MODEL_KEYS and rest else [name]
        split[name] = keys
    split = {n: keys for n, keys in split.items() if not any(k.lower().startswith("optim") for k in keys[:-1][:2])}
    cuts = {
        n: max((i + 1 for i, k in enumerate(keys[:-1][:3]) if k in _MODEL_KEYS), default=0) for n, keys in split.items()
    }
    if any(cuts.values()):
        split = {n: keys for n, keys in split.items() if cuts[n]}
    if not split:
        raise ValueError(
            "the checkpoint holds no tensors of a model: expected a state dict, or one under 'state_dict' or 'model'"
        )
    return {name: ".".join(keys[cuts[name] :]) for name, keys in split.items()}
