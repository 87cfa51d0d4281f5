"""Weights on disk: a local folder, a file, or a hub id to a state dict of mapped tensors, however large."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.storage.file_content import read_json
from dpp_lightning.storage.locate import few_names, local_folder, local_path
from dpp_lightning.storage.mapped_file import map_safetensors, map_torch_file
from dpp_lightning.storage.model_folder import SIDE_PATTERNS
from dpp_lightning.storage.quantised import check_plain_weights, refuse_gguf
from dpp_lightning.storage.safetensors_writer import INDEX_FILE, SINGLE_FILE
from dpp_lightning.storage.sharded_checkpoint import is_sharded, load_sharded, read_sharded
from dpp_lightning.storage.tied_tensors import share_tied
from dpp_lightning.tensors.names import TensorSource, canonical_tensors

Progress = Callable[[int, int], None]  # called with the bytes that are done, and all of them
Weights = TensorSource | str | Path  # a module, a state dict, or what load_tensors takes

_TORCH_INDEX, _TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_few = partial(few_names, shown=10)


def load_tensors(source: str | Path, revision: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, as views of the file's mapped pages.

    Nothing is read before it is touched, and what was read takes no memory of its own: the kernel drops and reads
    again as it must, so a checkpoint may be larger than memory. Writing into a tensor changes private copies of its
    pages, never the file. The files must not be shortened or rewritten in place while their tensors are in use.

    Args:
        source: a ``.safetensors`` file; a PyTorch file (``.ckpt`` of Lightning: its ``state_dict``; ``.pt``, ``.pth``,
            ``.bin``: a state dict); a folder in Hugging Face's layout (of several sets of weights the one that
            transformers loads: safetensors before PyTorch files, one file before shards with an index); a sharded
            checkpoint (``.metadata`` and ``*.distcp``, see :mod:`dpp_lightning.storage.sharded_checkpoint`); or a hub
            id. Pickled code is never run.
        revision: branch, tag or commit of a hub id.

    Returns:
        Name to tensor. Tensors tied in a PyTorch file share their storage, and so do those that a folder holds twice
        although its ``config.json`` ties them; entries that are no tensors are left out.

    Raises:
        FileNotFoundError: no such file, a folder without weights, or shards that the index names and the folder lacks.
        ValueError: quantised weights, a damaged file or index, a PyTorch file with more than weights in it or of the
            format before 1.6.
        MemoryError: the system refuses to map a file.
    """
    path = local_path(source)
    if is_sharded(path):
        check_plain_weights(read_sharded(path), source)
        return load_sharded(path)
    tensors, folder = _load(path, source, revision)
    check_plain_weights(tensors, source, folder)
    return tensors if folder is None else share_tied(tensors, folder)


def _load(path: Path, source: str | Path, revision: str | None) -> tuple[dict[str, Tensor], Path | None]:
    """The tensors of a file, or of a folder and that folder."""
    if path.is_file():
        refuse_gguf([path.name], str(source))
        return _read(path), None
    folder = local_folder(source, revision, ["*.safetensors", "*.json", *SIDE_PATTERNS], "file or folder")
    if not path.is_dir() and not any(folder.glob("*.safetensors")):
        folder = local_folder(source, revision, ["pytorch_model*.bin", "*.json"], "file or folder")
    return _read_folder(folder), folder


def has_hf_names(source: str | Path) -> bool:
    """Whether tensors in a source are named as in the model's Hugging Face files, to the letter: so in a hub folder or
    a safetensors file, unless a state dict was put there as it is in memory; not in a trainer's checkpoint."""
    return Path(source).suffix not in (".ckpt", ".pt", ".pth") and not is_sharded(Path(source))


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of all tensors in bytes; tied ones count each time."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read(path: Path) -> dict[str, Tensor]:
    return map_torch_file(path) if path.suffix in _TORCH_SUFFIXES else map_safetensors(path)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Safetensors before PyTorch files; the usual name, else an index, else the only file there is."""
    candidates: list[Path] = []
    for index, single, suffixes in (
        (INDEX_FILE, SINGLE_FILE, (".safetensors",)),
        (_TORCH_INDEX, _TORCH_SINGLE, _TORCH_SUFFIXES),
    ):
        if (folder / single).is_file():
            return _read(folder / single)
        if (folder / index).is_file():
            return _read_shards(folder / index)
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(files) == 1:
            return _read(files[0])
        candidates += files
    refuse_gguf((path.name for path in folder.iterdir()), str(folder))
    raise FileNotFoundError(
        f"{folder}: expected {SINGLE_FILE}, {_TORCH_SINGLE} or an index with its shards, found "
        f"{_few(f.name for f in candidates) or 'neither'}; name the file itself, or save the weights again with "
        "save_pretrained(folder), which writes safetensors"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the shards that an index names, checked against it."""
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks shards that {index.name} names: {_few(missing)}; fetch them")
    tensors: dict[str, Tensor] = {}
    repeated: list[str] = []
    for shard in shards:
        shard_tensors = _read(index.parent / shard)
        repeated += [name for name in shard_tensors if name in tensors]
        tensors.update(shard_tensors)
    absent = [name for name in weight_map if name not in tensors]
    if repeated or absent:
        faults = [f"in more than one shard: {_few(repeated)}"] if repeated else []
        faults += [f"in no shard: {_few(absent)}"] if absent else []
        raise ValueError(f"{index} does not fit its shards: tensors {'; '.join(faults)}. Fetch or save the model again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard of an index, every shard a plain file name."""
    content = read_json(index, pairs=_without_repeats)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(
            f"{index}: expected a weight_map of names of tensors to names of files; fetch or save it again"
        )
    unsafe = [s for s in set(weight_map.values()) if s in ("", ".", "..") or "\0" in s or PureWindowsPath(s).name != s]
    if unsafe:
        raise ValueError(f"{index}: shards must be plain names of files in its folder, got {_few(map(repr, unsafe))}")
    return weight_map


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which every name stands once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def common_dtype(source: str | Path, names: Collection[str], revision: str | None = None) -> torch.dtype | None:
    """The dtype that holds the floating-point tensors of a model's files exactly: their own, or of several the wider.

    transformers loads all weights of a model in one dtype, which need not be one that a delta fits: where norms are in
    float32 and the rest in bfloat16, the norms would be rounded.

    Args:
        source, revision: as for :func:`load_tensors`.
        names: canonical names of the tensors that count, as files may have buffers in another dtype. Where the files
            have none of them, every tensor counts.

    Returns:
        None where they are of fewer than 16 bits, which is a quantised model.
    """
    held = canonical_tensors(load_tensors(source, revision))
    dtypes = {name: tensor.dtype for name, tensor in held.items() if tensor.is_floating_point()}
    counted = {dtypes[name] for name in names if name in dtypes} or {*dtypes.values()}
    if not counted or min(dtype.itemsize for dtype in counted) < 2:
        return None
    return reduce(torch.promote_types, counted)
