"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path, *, replaces: str = "", empty: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    Args:
        folder: the final name; parents are made.
        replaces: an existing folder is replaced only if it is empty or holds a file of this name.
        empty: an existing folder is replaced only if it is empty.

    Raises:
        FileExistsError: the folder exists and holds something else.
        OSError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if empty or not folder.is_dir():
            raise FileExistsError(f"{folder} exists and is not empty; choose another folder, it is not overwritten")
        if not (folder / replaces).is_file():
            raise FileExistsError(
                f"{folder} exists and holds no {replaces}; choose another folder, it is not overwritten"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            _sync(path)
        _take_name(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path, *, suffix: str | None = None) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it when the block ends without an exception.

    Args:
        path: the final name; parents are made.
        suffix: of the temporary name, where a kill should not leave one that is taken for such a file; default
            that of ``path``.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=path.suffix if suffix is None else suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: into a folder of shards Lightning writes ``meta.pt`` last."""
    return checkpoint.is_file() or (checkpoint / "meta.pt").is_file()


def check_writable(folder: Path) -> None:
    """Fail now, not after hours, if nothing can be written into a folder; makes it.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder}: {error.strerror or error}; choose another output folder"
        ) from error


def _take_name(temporary: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        folder.replace(old)
    temporary.replace(folder)
    _sync(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
