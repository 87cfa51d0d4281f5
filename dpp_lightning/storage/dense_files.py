"""What lies in a dense folder beside its weights: side files, and the weights' dtype in ``config.json``."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch

from dpp_lightning.storage.model_configuration import CONFIG
from dpp_lightning.storage.model_folder import copy_files
from dpp_lightning.storage.safetensors_writer import Entry

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers from version 5 on, and before
_MODULES_FILE = "modules.json"


def write_dense_files(files: Mapping[str, Path], folder: Path, weights: Sequence[Entry]) -> None:
    """Copy the side files of a dense model beside its weights.

    ``from_pretrained`` casts to the dtype that ``config.json`` names, so it is made that of the weights; a warning says
    what it named. Code of a model's own is not copied; a warning names it.

    Args:
        files: as :func:`dpp_lightning.storage.model_folder.dense_side_files` gives them.
        folder: exists.
        weights: what the folder's files of weights hold.

    Raises:
        ValueError: as :func:`dpp_lightning.storage.model_folder.copy_files`.
        OSError: it cannot be written.
    """
    copy_files(files, folder)
    replaced = match_dtype(folder / CONFIG, weights)
    if replaced is not None:
        warnings.warn(
            f"the fine-tuned model's config.json names {replaced[0]}; the weights are written in the base's dtype, "
            f"{replaced[1]}, and config.json says so",
            stacklevel=2,
        )
    names = code_files(files)
    if names:
        warnings.warn(
            f"code of the model's own is not copied, {', '.join(names)}: put it from the fine-tuned model's folder "
            "into the dense one, and load the model with trust_remote_code=True",
            stacklevel=2,
        )


def match_dtype(config: Path, weights: Iterable[Entry]) -> tuple[str, str] | None:
    """Make the dtype that a configuration names that of most of the weights, and leave all else as it is.

    Configurations inside it (of text, of vision) that named the same dtype follow it.

    Args:
        config: ``config.json``; left alone where it is not there, is no JSON object or names no dtype.
        weights: what the model's files hold.

    Returns:
        The dtype that it named and the one that it names now; None where it named none or is left alone.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in weights:
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += prod(entry.shape)
    try:
        content = json.loads(config.read_bytes()) if config.is_file() else None
    except (ValueError, RecursionError):
        return None
    if not sizes or not isinstance(content, dict):
        return None
    dtype = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    named = next((content[key] for key in _DTYPE_KEYS if isinstance(content.get(key), str)), None)
    if _replace_dtype(content, named, dtype):
        config.write_bytes((json.dumps(content, indent=2) + "\n").encode())
    return None if named in (None, dtype) else (named, dtype)


def code_files(files: Mapping[str, Path]) -> list[str]:
    """Files of Python that a model's configuration, tokenizer, processor or list of modules names, sorted.

    Classes that transformers fetches from another repository of the hub, or that an installed package has, are not
    among them.
    """
    names = set()
    for name, path in files.items():
        if "/" in name or path.suffix != ".json" or not name.endswith(("config.json", _MODULES_FILE)):
            continue
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        names |= set(_own_classes(content, modules=name == _MODULES_FILE))
    return sorted(f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in names)


def _replace_dtype(section: dict[str, Any], named: str | None, dtype: str) -> bool:
    """Whether something was replaced: the dtypes that are ``named``, all of them where the outermost names none."""
    replaced = False
    for key, value in section.items():
        if isinstance(value, dict):
            replaced |= _replace_dtype(value, named, dtype)
        elif key in _DTYPE_KEYS and isinstance(value, str) and named in (None, value) and value != dtype:
            section[key], replaced = dtype, True
    return replaced


def _own_classes(content: Any, *, modules: bool) -> Iterable[str]:
    """Names of classes, ``FILE.CLASS``, for which a model's folder has to have the file."""
    if modules:
        entries = content if isinstance(content, list) else []
        listed = [entry.get("type") for entry in entries if isinstance(entry, dict)]
        named = [name for name in listed if isinstance(name, str) and not _is_installed(name)]
    else:
        auto_map = content.get("auto_map") if isinstance(content, dict) else None
        values = auto_map.values() if isinstance(auto_map, dict) else ()
        named = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in named if isinstance(name, str) and "." in name and "--" not in name]


def _is_installed(name: str) -> bool:
    package = name.partition(".")[0]
    try:
        return package == "sentence_transformers" or find_spec(package) is not None
    except (ValueError, ImportError):
        return False
