"""What ``.metadata`` of a sharded checkpoint says: which tensors there are, in which pieces, and where each piece lies.

The file is a pickle, which torch's own reader unpickles as it is, so that a hostile one runs any code. Here it is read
by an unpickler that makes plain values, sizes and dtypes; every other class becomes a record of its state, which is
never acted on. It has the opcodes alone that pickling such a description gives, and a dict as its memo, so that nine
bytes cannot ask for gigabytes; keys are plain before they are hashed, sizes whole numbers before they are multiplied.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any, ClassVar

import torch

METADATA_FILE = ".metadata"
CURE = "copy the whole folder again, or save the checkpoint again"
_MODEL_KEYS = frozenset({"state_dict", "model", "module", "model_state_dict"})
_MOST_DIMENSIONS, _MOST_NUMBER = 64, 1 << 62
_OPCODES = frozenset(
    (pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE)
    + (pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1 + pickle.BINFLOAT + pickle.BINUNICODE)
    + (pickle.SHORT_BINUNICODE + pickle.SHORT_BINBYTES + pickle.BINBYTES + pickle.EMPTY_DICT + pickle.SETITEM)
    + (pickle.SETITEMS + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS + pickle.EMPTY_TUPLE + pickle.TUPLE)
    + (pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.EMPTY_SET + pickle.ADDITEMS + pickle.BINPUT)
    + (pickle.LONG_BINPUT + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET + pickle.GLOBAL)
    + (pickle.STACK_GLOBAL + pickle.REDUCE + pickle.NEWOBJ + pickle.BUILD)
)

Offsets = tuple[int, ...]  # where a piece begins in its tensor, by dimension
PieceKey = tuple[str, Offsets]  # name of a tensor in the checkpoint, and the piece


@dataclass(frozen=True)
class TensorLayout:
    """A tensor as the metadata describes it.

    Attributes:
        dtype, shape: of the whole.
        pieces: offsets to sizes of the rectangles that hold its entries; empty ones are left out.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Mapping[Offsets, tuple[int, ...]]


@dataclass(frozen=True)
class FileSpan:
    """Where the PyTorch file of one piece lies: in which file of the folder, from which byte, how many bytes."""

    file: str
    start: int
    length: int


def read_metadata(folder: Path) -> tuple[dict[str, str], dict[str, TensorLayout], dict[PieceKey, FileSpan]]:
    """What a folder's ``.metadata`` says.

    Returns:
        (name in the checkpoint to name in the model's state dict, for the model's tensors alone; name in the
        checkpoint to layout; piece to where it lies).

    Raises:
        ValueError: damaged, not such a file, or without tensors of a model.
    """
    path = folder / METADATA_FILE
    metadata = _unpickle(path)
    try:
        layouts = _tensor_layouts(metadata)
        return _model_names(layouts, metadata.get("planner_data")), layouts, _file_spans(metadata)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not describe a checkpoint ({_short(error)}); {CURE}") from error


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


def _size(values: Any = ()) -> tuple[int, ...]:
    """A ``torch.Size``, or what stands for one.

    Raises:
        TypeError: anything but whole numbers from 0 to 2**62, at most 64.
    """
    if type(values) not in (tuple, list) or len(values) > _MOST_DIMENSIONS:
        raise TypeError("a size that is no short tuple")
    if not all(type(number) is int and 0 <= number <= _MOST_NUMBER for number in values):
        raise TypeError("a size with something else than whole numbers from 0 to 2**62")
    return tuple(values)


def _empty_dict() -> dict[Any, Any]:
    """An ``OrderedDict``, which is pickled as an empty one and its items."""
    return {}


_PurePython: Any = pickle._Unpickler  # type: ignore[attr-defined]  # its memo is a dict, that of C an array that grows


class _Unpickler(_PurePython):  # type: ignore[misc]
    """Plain values, sizes and dtypes are themselves, all else is a :class:`_Record`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _Record

    def load_setitem(self) -> None:
        """A key and its value."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Keys and values since the mark."""
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_additems(self) -> None:
        """Members of a set since the mark."""
        _check_keys(self.stack)
        super().load_additems()

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        opcode: load for opcode, load in _PurePython.dispatch.items() if opcode in _OPCODES
    }
    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
    }


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys whose hash could take for ever, such as tuples of tuples that hold one another many times.

    Raises:
        TypeError: a key that is neither a plain value, nor a record, nor a short tuple of plain values.
    """
    plain = (str, int, bool, float, bytes, type(None), _Record)
    for key in keys:
        short = type(key) is tuple and len(key) <= _MOST_DIMENSIONS and all(type(part) in plain for part in key)
        if type(key) not in plain and not short:
            raise TypeError(f"a key of {type(key).__name__}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with io.BytesIO(path.read_bytes()) as file:  # of which no more is read than there is
            state = getattr(_Unpickler(file).load(), "state", None)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle ends in almost any type
        raise ValueError(f"{path} cannot be read ({_short(error)}); {CURE}") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict_metadata"), dict):
        raise ValueError(f"{path} is not the metadata of a torch.distributed.checkpoint; {CURE}")
    return state


def _short(error: Exception) -> str:
    """An error in few words: its message may quote as much as the file holds."""
    return f"{type(error).__name__}: {str(error)[:100]}" if str(error) else type(error).__name__


def _tensor_layouts(metadata: Mapping[str, Any]) -> dict[str, TensorLayout]:
    layouts = {}
    for name, record in metadata["state_dict_metadata"].items():
        if not isinstance(record.state, dict) or "chunks" not in record.state:
            continue  # not a tensor
        properties = record.state["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        shape, chunks = _size(record.state["size"]), [chunk.state for chunk in record.state["chunks"]]
        sizes = {_size(chunk["offsets"]): _size(chunk["sizes"]) for chunk in chunks}
        held = sum(map(prod, sizes.values()))
        inside = all(len(offsets) == len(size) == len(shape) for offsets, size in sizes.items()) and all(
            0 <= o <= o + s <= n
            for offsets, size in sizes.items()
            for o, s, n in zip(offsets, size, shape, strict=True)
        )
        if type(name) is not str or not isinstance(dtype, torch.dtype) or not inside or held != prod(shape):
            raise ValueError(
                f"{METADATA_FILE}: the pieces of {str(name)[:200]} hold {held} of its {prod(shape)} entries; {CURE}"
            )
        layouts[name] = TensorLayout(dtype, shape, {offsets: size for offsets, size in sizes.items() if prod(size)})
    return layouts


def _file_spans(metadata: Mapping[str, Any]) -> dict[PieceKey, FileSpan]:
    spans = {}
    for index, info in metadata["storage_data"].items():
        if index.state.get("offset") is None:
            continue  # not a tensor
        storage = info.state
        if storage.get("transform_descriptors"):
            raise ValueError("the checkpoint is compressed, which is not read here; save it without extensions")
        file, start, length = storage["relative_path"], storage["offset"], storage["length"]
        if type(file) is not str or type(index.state["fqn"]) is not str:
            raise TypeError("a name that is no text")
        start, length = _size((start, length))
        outside = file.startswith(("/", "\\")) or ".." in PureWindowsPath(file).parts or PureWindowsPath(file).drive
        if outside or "\0" in file:
            raise ValueError(f"{METADATA_FILE}: expected files inside the folder, got {file[:200]!r}; {CURE}")
        spans[index.state["fqn"], _size(index.state["offset"])] = FileSpan(file, start, length)
    return spans


def _path(keys: Any) -> list[str]:
    """The keys of nested dicts that lead to a tensor.

    Raises:
        TypeError: anything but a short tuple of texts and whole numbers.
    """
    if type(keys) not in (tuple, list) or len(keys) > _MOST_DIMENSIONS:
        raise TypeError("a path of keys that is no short tuple")
    if not all(type(key) in (str, int) for key in keys):
        raise TypeError("a key that is no text and no whole number")
    return [str(key) for key in keys]


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
        keys = _path(given) if given else [first, rest] if first in _MODEL_KEYS and rest else [name]
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
