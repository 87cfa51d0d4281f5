"""Where a source lies: a path on this machine, or a repository of the hub; and what to say where it is neither.

A hub id (``name``, ``organisation/name``) has the form of a relative path. It is one only where nothing tells that a
path is meant, so that a mistyped path is never asked of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_FILE_NAME = re.compile(
    r".*\.(safetensors|bin|ckpt|pth?|distcp|npz|h5|gguf|onnx|msgpack|jsonl?|ya?ml|txt|md|[ct]sv|parquet|arrow|zip|tar|t?gz|zst)",
    re.IGNORECASE,
)


def local_path(source: str | Path) -> Path:
    """The source as a path, with ``~`` as the home directory."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # of a user who has no home
        return Path(source)


def hub_id(source: str | Path) -> str | None:
    """The source as a hub id, where it has the form of one and nothing tells that a path is meant.

    A path is meant where the source has a file's suffix such as ``.safetensors``, where its first part is a folder of
    this machine, or where it lies on this machine.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    path = Path(text)
    if not _HUB_ID.fullmatch(text) or _FILE_NAME.fullmatch(text) or path.exists() or path.is_symlink():
        return None
    return None if len(path.parts) > 1 and Path(path.parts[0]).is_dir() else text


def local_folder(
    source: str | Path, revision: str | None, patterns: Sequence[str], wanted: str = "folder", argument: str = ""
) -> Path:
    """The folder itself, or where the files of a hub id lie on this machine once they are fetched.

    Args:
        source: a local folder or a hub id.
        revision: branch, tag or commit of a hub id.
        patterns: glob patterns of the names of the files to fetch.
        wanted: what was expected, for the message.
        argument: what the user calls the source, such as ``BASE``, for the message.

    Raises:
        FileNotFoundError: no such folder, nor such a repository of the hub; or the hub was not asked, since it is
            switched off, and its cache does not hold the files.
        PermissionError: the repository may not be read.
        ConnectionError: the hub cannot be reached, and its cache does not hold the files.
    """
    path = local_path(source)
    if path.is_dir():
        return path
    repo_id = hub_id(source)
    if repo_id is None:
        raise not_found(source, wanted, argument)
    from dpp_lightning.storage.hub import fetch_folder  # only where it is needed: the client takes long to import

    try:
        return fetch_folder(repo_id, revision, patterns)
    except (FileNotFoundError, PermissionError, ConnectionError) as error:
        here = not_found(source, wanted, argument, cure=False)
        kind = next(k for k in (FileNotFoundError, PermissionError, ConnectionError) if isinstance(error, k))
        raise kind(f"{here}; and as a hub id: {error}") from error


def not_found(
    source: str | Path, wanted: str = "file or folder", argument: str = "", *, cure: bool = True
) -> FileNotFoundError:
    """The error for a source that does not lie on this machine, with the nearest name that does.

    Args:
        source: as the user gave it.
        wanted: what was expected: ``folder``, ``file or folder``, ``checkpoint`` and the like.
        argument: what the user calls the source, such as ``BASE``.
        cure: ask to check the path where no name is near.
    """
    path, name = local_path(source), subject(source, argument)
    if path.is_file():
        return FileNotFoundError(f"{name}: no such {wanted}: it is a file")
    if path.is_symlink():
        return FileNotFoundError(f"{name} is a link to {path.readlink()}, which is not there: fetch or copy it again")
    return FileNotFoundError(f"{name}: no such {wanted}{_hint(source, path, wanted, cure=cure)}")


def _hint(source: str | Path, path: Path, wanted: str, *, cure: bool) -> str:
    """The nearest name that is there; else the folder that is missing, or why the source was not taken for a hub id."""
    near = near_path(path)
    if near is not None:
        return f": did you mean {near}?" if cure else f" (did you mean {near}?)"
    parent, repository = _nearest_parent(path), _has_form_of_hub_id(source)
    if repository and len(path.parts) > 1 and path.parent.is_dir():
        return f": the folder {path.parent} is here, so that this is not taken for a hub id; check the path"
    lost = "" if parent == path.parent else f" (nor a folder {Path(*path.parts[: len(parent.parts) + 1])})"
    if not cure:
        return lost
    return f"{lost}: check the path" + ("" if repository or "folder" not in wanted else "; a hub id it cannot be")


def near_path(path: Path) -> Path | None:
    """The path that was probably meant: the nearest name where the first missing folder or file should lie."""
    parent = _nearest_parent(path)
    rest = path.parts[len(parent.parts) :]
    if not rest or not parent.is_dir():
        return None
    try:
        names = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        return None
    suffix = Path(rest[0]).suffix  # which makes names alike that are not
    by_spelling = {name.removesuffix(suffix).lower(): name for name in names}
    near = get_close_matches(rest[0].removesuffix(suffix).lower(), by_spelling, n=1, cutoff=0.7)
    if not near:
        return None
    meant = parent.joinpath(by_spelling[near[0]], *rest[1:])
    return meant if meant.exists() else near_path(meant) if len(rest) > 1 else None


def subject(source: str | Path, argument: str) -> str:
    """How a message begins: the argument, and the source as the user gave it."""
    text = str(source)
    shown = text if text and not any(letter.isspace() for letter in text) else repr(text)
    return f"{argument} {shown}".strip()


def few_names(names: Iterable[str | Path], shown: int = 6) -> str:
    """The first names, and how many more there are.

    Args:
        names: in order.
        shown: how many are given at most.
    """
    listed = [str(name) for name in names]
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")


def _nearest_parent(path: Path) -> Path:
    """The innermost folder on the way to a path that is there; ``.`` for a relative path of which nothing is."""
    return next((parent for parent in path.parents if parent.is_dir()), Path())


def _has_form_of_hub_id(source: str | Path) -> bool:
    text = source.as_posix() if isinstance(source, Path) else source
    return bool(_HUB_ID.fullmatch(text)) and not _FILE_NAME.fullmatch(text)
