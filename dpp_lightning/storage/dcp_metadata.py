"""``.metadata`` of a sharded checkpoint: which tensors it holds, in which pieces, and where each piece lies.

It is a pickle, which torch's own reader unpickles as it is, so that a hostile one runs any code. Here it is read by an
unpickler that knows sizes and dtypes; every other class becomes a record of plain values, and nothing of it can run.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

METADATA_FILE = ".metadata"
CURE = "copy the whole folder again, or save the checkpoint again"
_MODEL_KEYS = frozenset({"state_dict", "model", "module", "model_state_dict"})

Key = tuple[str, tuple[int, ...]]  # name of a tensor, and the offsets of a piece


@dataclass(frozen=True)
class Outline:
    """A tensor as the metadata describes it.

    Attributes:
        dtype, shape: of the whole.
        pieces: offsets to sizes of the rectangles that hold its entries; empty ones are left out.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Mapping[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Where the PyTorch file of one piece lies: in which file of the folder, from which byte, how long it is."""

    file: str
    start: int
    length: int


def read_metadata(path: Path) -> tuple[dict[str, str], dict[str, Outline], dict[Key, Place]]:
    """What the file says.

    Returns:
        (name in the checkpoint to name in the model's state dict, for the model's tensors alone; name in the
        checkpoint to tensor; piece to place).

    Raises:
        ValueError: damaged, not such a file, or without tensors of a model.
    """
    metadata = _unpickled(path)
    try:
        tensors = _tensors(metadata)
        return _model_part(tensors, metadata.get("planner_data")), tensors, _places(metadata)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} does not describe a checkpoint ({error!r}); {CURE}") from error


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


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            state = getattr(_Unpickler(file).load(), "state", None)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle ends in almost any type
        raise ValueError(f"{path} cannot be read ({error!r}); {CURE}") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict_metadata"), dict):
        raise ValueError(f"{path} is not the metadata of a torch.distributed.checkpoint; {CURE}")
    return state


def _tensors(metadata: Mapping[str, Any]) -> dict[str, Outline]:
    tensors = {}
    for name, record in metadata["state_dict_metadata"].items():
        if not isinstance(record.state, dict) or "chunks" not in record.state:
            continue  # not a tensor
        properties = record.state["properties"].state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        shape = tuple(record.state["size"])
        sizes = {tuple(c.state["offsets"]): tuple(c.state["sizes"]) for c in record.state["chunks"]}
        held = sum(map(prod, sizes.values()))
        inside = all(len(at) == len(size) == len(shape) for at, size in sizes.items()) and all(
            0 <= o <= o + s <= n for at, size in sizes.items() for o, s, n in zip(at, size, shape, strict=True)
        )
        if not isinstance(dtype, torch.dtype) or not inside or held != prod(shape):
            raise ValueError(f"{METADATA_FILE}: the pieces of {name} hold {held} of its {prod(shape)} entries; {CURE}")
        tensors[name] = Outline(dtype, shape, {at: size for at, size in sizes.items() if prod(size)})
    return tensors


def _places(metadata: Mapping[str, Any]) -> dict[Key, Place]:
    places = {}
    for index, info in metadata["storage_data"].items():
        if index.state.get("offset") is None:
            continue  # not a tensor
        about = info.state
        if about.get("transform_descriptors"):
            raise ValueError(
                f"the checkpoint is compressed ({about['transform_descriptors']}), which is not read here; save it "
                "without extensions"
            )
        file, start, length = about["relative_path"], about["offset"], about["length"]
        odd = file.startswith(("/", "\\")) or ".." in PureWindowsPath(file).parts or PureWindowsPath(file).drive
        if odd or "\0" in file or start < 0 or length < 0:
            raise ValueError(f"{METADATA_FILE}: expected files inside the folder, got {file!r} at {start}; {CURE}")
        places[index.state["fqn"], tuple(index.state["offset"])] = Place(file, start, length)
    return places


def _model_part(names: Iterable[str], paths: Mapping[str, Any] | None) -> dict[str, str]:
    """Of all names those of the model, each with its name in the model.

    ``paths`` are the keys of the nested dicts that were flattened into the names.
    """
    split = {}
    for name in names:
        first, _, rest = name.partition(".")
        given = paths.get(name) if isinstance(paths, Mapping) else None
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
