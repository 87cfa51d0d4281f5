"""Weights on disk: a local folder, a file, or a hub id to a state dict of mapped tensors, however large."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from dpp_lightning.storage.mapped_file import map_pages, map_safetensors
from dpp_lightning.storage.safetensors_writer import INDEX_FILE, SINGLE_FILE
from dpp_lightning.storage.sharded_checkpoint import is_sharded, load_sharded
from dpp_lightning.storage.torch_file import filled, outline
from dpp_lightning.tensors.names import TensorSource

_TORCH_INDEX, _TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_SIDE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.*",
)
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".bpe", ".jinja", ".tiktoken"})  # neither code nor pickles
_CURE = "save the weights again with save_pretrained(folder), which writes safetensors"


def load_tensors(source: str | Path, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, as views of the file's mapped pages.

    Nothing is read before it is touched, and what was read takes no memory of its own: the kernel drops and reads
    again as it must, so a checkpoint may be larger than memory. Writing into a tensor changes private copies of its
    pages, never the file. The files must not be shortened or rewritten in place while their tensors are in use.

    Args:
        source: a ``.safetensors`` file; a PyTorch file (``.ckpt`` of Lightning: its ``state_dict``; ``.pt``, ``.pth``,
            ``.bin``: a state dict); a folder in Hugging Face's layout (one file, or shards with an index; safetensors
            before PyTorch files); a sharded checkpoint (``.metadata`` and ``*.distcp``, see
            :mod:`dpp_lightning.storage.sharded_checkpoint`); or a hub id. Pickled code is never run.
        revision: branch, tag or commit of a hub id.

    Returns:
        Name to tensor. Tensors tied in a PyTorch file share their storage; entries that are no tensors are left out.

    Raises:
        FileNotFoundError: no such file, a folder without weights, or shards that the index names and the folder lacks.
        ValueError: a damaged file or index, a PyTorch file with more than weights in it or of the format before 1.6.
        MemoryError: the system refuses to map a file.
    """
    path = Path(source)
    if path.is_file():
        return _read(path)
    if is_sharded(path):
        return load_sharded(path)
    folder = local_folder(source, revision, ["*.safetensors", "*.json", *_SIDE_PATTERNS], "file or folder")
    if not path.is_dir() and not any(folder.glob("*.safetensors")):
        folder = local_folder(source, revision, ["pytorch_model*.bin", "*.json"], "file or folder")
    return _read_folder(folder)


def local_folder(source: str | Path, revision: str | None, patterns: list[str], wanted: str = "folder") -> Path:
    """The folder itself, or where the files of a hub id now lie on this machine.

    Args:
        source: a local folder or a hub id.
        revision: branch, tag or commit of a hub id.
        patterns: names of the files to fetch.
        wanted: what was expected, for the message.

    Raises:
        FileNotFoundError: neither a folder nor of the form of a hub id.
    """
    if Path(source).is_dir():
        return Path(source)
    hub_id = str(source)
    if hub_id.startswith((".", "/", "~")) or hub_id.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such {wanted} (nor a hub id)")
    from huggingface_hub import snapshot_download  # a local folder needs no HTTP client, which is slow to import

    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))


def side_files(source: str | Path, revision: str | None = None, tasks: Sequence[str] = ()) -> dict[str, Path]:
    """What belongs to a model beside its weights: configuration, tokenizer, processor, chat template.

    Neither code nor pickles are among them.

    Args:
        source: as for :func:`load_tensors`.
        revision: branch, tag or commit of a hub id.
        tasks: of a merged delta, whose files may bear their task's name: ``sst2.config.json``.

    Returns:
        File name to path, sorted; nothing for a source that is a file.

    Raises:
        FileNotFoundError: neither file nor folder nor of the form of a hub id.
    """
    if Path(source).is_file():
        return {}
    folder = local_folder(source, revision, list(_SIDE_PATTERNS), "file or folder")
    files = (path for path in sorted(folder.iterdir()) if path.is_file())
    return {path.name: path for path in files if any(_is_side_file(path, f"{t}." if t else "") for t in ("", *tasks))}


def has_own_names(source: str | Path) -> bool:
    """Whether the names in a source are those of the model's own files: so in a hub folder or a safetensors file, not
    in a trainer's checkpoint."""
    return Path(source).suffix not in (".ckpt", ".pt", ".pth") and not is_sharded(Path(source))


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of all tensors in bytes; tied ones count each time."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_side_file(path: Path, start: str = "") -> bool:
    name = path.name.removeprefix(start)
    return path.suffix in _SIDE_SUFFIXES and any(fnmatchcase(name, pattern) for pattern in _SIDE_PATTERNS)


def _read(path: Path) -> dict[str, Tensor]:
    return _read_torch(path) if path.suffix in _TORCH_SUFFIXES else map_safetensors(path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Safetensors before PyTorch files; an index, else the usual name, else the only file there is."""
    found: list[Path] = []
    for index, single, suffixes in (
        (INDEX_FILE, SINGLE_FILE, (".safetensors",)),
        (_TORCH_INDEX, _TORCH_SINGLE, _TORCH_SUFFIXES),
    ):
        if (folder / index).is_file():
            return _read_shards(folder / index)
        if (folder / single).is_file():
            return _read(folder / single)
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(files) == 1:
            return _read(files[0])
        found += files
    raise FileNotFoundError(
        f"{folder}: expected {SINGLE_FILE}, {_TORCH_SINGLE} or an index with its shards, found "
        f"{_few(f.name for f in found) or 'neither'}; name the file itself, or {_CURE}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards that an index names, checked against it."""
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks shards that {index.name} names: {_few(missing)}; fetch them")
    tensors: dict[str, Tensor] = {}
    twice: list[str] = []
    for shard in shards:
        new = _read(index.parent / shard)
        twice += [name for name in new if name in tensors]
        tensors.update(new)
    absent = [name for name in weight_map if name not in tensors]
    if twice or absent:
        faults = [f"in more than one shard: {_few(twice)}"] if twice else []
        faults += [f"in no shard: {_few(absent)}"] if absent else []
        raise ValueError(f"{index} does not fit its shards: tensors {'; '.join(faults)}. Fetch or save the model again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard of an index, every shard a plain file name."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map, got {error!r}; fetch or save it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: weight_map must map names of tensors to names of files; fetch or save it again")
    odd = [s for s in set(weight_map.values()) if s in ("", ".", "..") or "\0" in s or PureWindowsPath(s).name != s]
    if odd:
        raise ValueError(f"{index}: shards must be plain names of files in its folder, got {_few(map(repr, odd))}")
    return weight_map


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict of a PyTorch file, mapped, by the unpickler that runs no code."""
    try:
        content = _torch_load(path)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds more than weights: {named[1] if named else error} is not allowed, since unpickling it could "
            f"run any code; {_CURE}, or save model.state_dict() alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file ends in almost any type
        old = "mmap can only be used" in str(error)
        what = "is not in PyTorch's zip format (of version 1.6 and later)" if old else f"cannot be read ({error})"
        raise ValueError(f"{path} {what}; {_CURE}, or fetch the file again") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or any(isinstance(part, Mapping | list | tuple) for part in state.values()):
        got = f"a dict of {_few(map(repr, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a state dict, or a checkpoint with a 'state_dict', got {got}; {_CURE}")
    return {str(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _torch_load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "Cannot allocate memory" not in str(error):
            raise
    # torch maps as safetensors does, which the kernel refuses for a file larger than memory: ask for the places only
    content = outline(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    return filled(state, map_pages(path)) if isinstance(state, Mapping) else content


def _few(names: Iterable[str], shown: int = 10) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")


Progress = Callable[[int, int], None]  # bytes done, bytes in all


Weights = TensorSource | str | Path
