"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

A folder that replaces another takes two renames, and no system call does both at once: a machine that stops between
them leaves the old folder beside the new one, as ``.NAME.….old``. On Windows a folder has no sync of its own, and
nothing is replaced while one of its files is open or mapped.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    Args:
        folder: the final name, absolute and no link; parents are made. What it holds is replaced, whatever it is.
        check: raises if that may not be; called at the start, and once more before the name is taken.

    Raises:
        OSError: it cannot be written, or on Windows replaced while a file in it is open.
    """
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        check()
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
        OSError: it cannot be written, or on Windows replaced while it is open.
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


def check_writable(folder: Path) -> None:
    """Fail now, not after hours, if nothing can be written into a folder; one that is not there is not made.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {folder}: {error.strerror or error}; choose another output folder"
        ) from error


def _take_name(temporary: Path, folder: Path) -> None:
    """Rename the temporary folder; an older one is moved aside first, since only POSIX replaces a folder by another."""
    old = temporary.with_name(f"{temporary.name}.old")
    replaced = folder.exists()
    try:
        if replaced:
            folder.replace(old)
        temporary.replace(folder)
    except OSError as error:
        if replaced and not folder.exists():
            old.replace(folder)
        if sys.platform == "win32" and isinstance(error, PermissionError):
            raise PermissionError(
                f"{folder} cannot be replaced: on Windows none of its files may be open; close the programs and delete "
                "the tensors that read it, or choose another folder"
            ) from error
        raise
    _sync(folder.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, onto the disk."""
    if sys.platform == "win32":
        if path.is_dir():
            return  # it cannot be opened there
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)  # only what is open for writing can be synced there
    else:
        flags = os.O_RDONLY
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
