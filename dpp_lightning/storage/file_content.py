"""Files that are not what their names say: pointers of Git LFS, web pages, archives, empty and truncated files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".zst")
TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
_ZIP, _GZIP, _TAR, _TAR_AT = b"PK\x03\x04", b"\x1f\x8b", b"ustar", 257
_CURE = "copy or download it again"


def check_content(path: Path, name: str = "") -> None:
    """Refuse a file that cannot be what its name says. Its first bytes are read, of safetensors the header, JSON whole.

    Args:
        path: a file that is there.
        name: what the message calls it; default its path.

    Raises:
        ValueError: a pointer of Git LFS, a web page, an archive, an empty file, JSON that cannot be parsed, or
            safetensors and PyTorch files that are truncated or of another kind.
        PermissionError: it may not be read.
    """
    name = name or str(path)
    head = _head(path, name)
    if not head:
        raise ValueError(f"{name} is empty (0 bytes): {_CURE}")
    if head.startswith(_LFS_POINTER):
        what = "weights" if path.suffix in (".safetensors", *TORCH_SUFFIXES) else "file itself"
        raise ValueError(f"{name} is a Git LFS pointer, not the {what}: run git lfs pull in {path.parent}")
    if head.lstrip().lower().startswith(_WEB_PAGE):
        raise ValueError(
            f"{name} is a web page (HTML) that was saved under this name: download the file itself, such as with "
            "hf download"
        )
    _check_kind(path, name, head)


def read_json(path: Path, name: str = "", pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a file of JSON holds.

    Args:
        path: a file that is there.
        name: what the message calls it; default its path.
        pairs: makes an object of its names and values; default a dict.

    Raises:
        ValueError: it is not UTF-8 or not JSON, or nested too deeply.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        fault = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{name or path} is not readable JSON ({fault}): {_CURE}, or save the model again") from error


def read_json_object(path: Path, name: str = "") -> dict[str, Any]:
    """What a file of JSON holds, if that is an object.

    Args:
        path, name: as for :func:`read_json`.

    Raises:
        ValueError: as :func:`read_json`, or it holds anything else.
    """
    content = read_json(path, name)
    if not isinstance(content, dict):
        raise ValueError(f"{name or path} is no JSON object: {_CURE}")
    return content


def _check_kind(path: Path, name: str, head: bytes) -> None:
    """Refuse what is not of the kind that the suffix names."""
    archive = head.startswith((_ZIP, _GZIP)) or head[_TAR_AT:].startswith(_TAR)
    if path.suffix in ARCHIVES or (archive and path.suffix not in TORCH_SUFFIXES):
        raise ValueError(f"{name} is an archive: unpack it and name what is in it")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):  # checks the header against the file's size
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{name} is not a whole safetensors file ({error}): {_CURE}, or save the model again with "
                "save_pretrained(folder)"
            ) from error
    elif path.suffix in TORCH_SUFFIXES and head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise ValueError(f"{name} is truncated, the end of the file is missing: {_CURE}")
    elif path.suffix == ".json":
        read_json(path, name)


def _head(path: Path, name: str) -> bytes:
    """The first bytes of a file.

    Raises:
        PermissionError: it may not be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(512)
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read by this user: change its permissions") from error
