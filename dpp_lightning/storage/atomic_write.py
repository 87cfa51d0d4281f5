"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

A folder that replaces another changes names with it in one step where the system can (Linux, macOS). Elsewhere it
takes two renames, and what a machine that stops between them leaves, the old folder as ``.NAME.….old``, is put back by
the next run into that place. Temporary files and folders of a run that was killed are removed by the next one that
writes into the same parent folder: a lock beside each says whether its owner lives. On Windows a folder has no
sync of its own, and nothing is replaced while one of its files is open or mapped.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

_HERE, _EXCHANGE, _SWAP = -100, 2, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # file systems that cannot exchange names
_LOCK_NAME = re.compile(r"(?P<temporary>\.(?P<name>.+)\.[0-9a-f]{8}(\.[^.]+)?)\.dpp\.lock")
_UNFINISHED: set[Path] = set()  # the temporary folders that this process is writing


@contextmanager
def atomic_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    Inside a temporary folder of this process nothing has to be atomic, since that one appears whole or not at all:
    there ``folder`` itself is written.

    Args:
        folder: the final name, absolute and no link; parents are made. What it holds is replaced, whatever it is.
        check: raises if that may not be; called at the start, and once more before the name is taken.

    Raises:
        OSError: it cannot be written, or on Windows replaced while a file in it is open.
    """
    if is_unfinished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    remove_leftovers(folder.parent)
    check()
    with scratch_folder(folder) as temporary:
        yield temporary
        temporary.chmod(0o755)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        check()
        _take_name(temporary, folder)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, removed when the block ends, that of a killed run by the next one.

    Args:
        folder: absolute, need not exist; parents are made.

    Raises:
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _owned(folder.parent / f".{folder.name}.{token_hex(4)}") as temporary:
        temporary.mkdir(mode=0o700)
        _UNFINISHED.add(temporary)
        try:
            yield temporary
        finally:
            _UNFINISHED.discard(temporary)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is, or lies in, a temporary folder that this process is writing; ``folder`` is absolute."""
    return not _UNFINISHED.isdisjoint((folder, *folder.parents))


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
    suffix = path.suffix if suffix is None else suffix
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with _owned(path.parent / f".{path.stem}.{token_hex(4)}{suffix}") as temporary:
        temporary.touch(mode=0o600, exist_ok=False)
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        _confirm(path)


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


@contextmanager
def _owned(temporary: Path) -> Iterator[Path]:
    """A name for a temporary file or folder, removed when the block ends, with a lock beside it.

    The lock is there before the name is taken, and the system lets go of it when its owner is killed. Where the file
    system has no locks there is none, and nobody removes what a killed run leaves.
    """
    lock = FileLock(_lock_of(temporary))
    try:
        with suppress(NotImplementedError, OSError):
            lock.acquire()
        if not lock.is_locked:  # else another run takes it, and what is written for left over
            _remove(_lock_of(temporary))
        yield temporary
    finally:
        _remove_with_lock(temporary, lock)


def _remove_with_lock(temporary: Path, lock: FileLock) -> None:
    """Remove what is temporary, then its lock; where something is left, the lock stays for the next run."""
    _remove(temporary)
    lock.release()
    if not (temporary.exists() or _old_of(temporary).exists()):
        _remove(_lock_of(temporary))


def _remove(path: Path) -> None:
    """Remove a file or a folder, or as much of it as can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.dpp.lock")


def _old_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.old")


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary files and folders that killed runs left in a folder.

    Where one was killed between two renames, the older folder gets its name back. What a run that lives is writing
    stays, and what cannot be removed.
    """
    with suppress(OSError):
        found = [match for path in parent.iterdir() if (match := _LOCK_NAME.fullmatch(path.name))]
        for match in found:
            temporary = parent / match["temporary"]
            lock = FileLock(_lock_of(temporary), timeout=0)
            with suppress(Timeout, NotImplementedError, OSError), lock:  # its owner lives, or nothing can be locked
                _put_back(_old_of(temporary), parent / match["name"])
                _remove_with_lock(temporary, lock)


def _put_back(old: Path, folder: Path) -> None:
    """Give an older folder its name back, or remove it where the name is taken."""
    if old.exists():
        if not folder.exists():
            old.replace(folder)
        _remove(old)


def _take_name(temporary: Path, folder: Path) -> None:
    """Give the temporary folder its name; what had the name before is removed."""
    if not folder.exists():
        temporary.replace(folder)
    elif not _exchanged(temporary, folder):
        _replace_in_two_steps(temporary, folder)
    _confirm(folder)


def _confirm(path: Path) -> None:
    """Have the system put the name that a file or folder has taken onto the disk.

    Raises:
        OSError: it does not say that this is done; the message says what is.
    """
    try:
        _sync(path.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"{path} is written and has its name, but the system does not confirm that: {error.strerror}"
        ) from error


def _exchanged(first: Path, second: Path) -> bool:
    """Whether two folders have changed names in one step; False where the system or file system cannot.

    Raises:
        OSError: any other reason.
    """
    if sys.platform == "win32":
        return False
    libc, names = ctypes.CDLL(None, use_errno=True), (bytes(first), bytes(second))
    if hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*names, _SWAP)
    else:
        return False
    number = ctypes.get_errno()
    if failed and number not in _UNKNOWN:
        raise OSError(number, os.strerror(number), str(second))
    return not failed


def _replace_in_two_steps(temporary: Path, folder: Path) -> None:
    """Move the older folder aside and take its name; it is back if that fails.

    Raises:
        OSError: as it is said; where the older one cannot be put back either, with the place it lies at.
    """
    old = _old_of(temporary)
    try:
        folder.replace(old)
        temporary.replace(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            try:
                old.replace(folder)
            except OSError as again:
                raise OSError(again.errno, f"{folder} cannot be replaced; what it held is in {old}: {again}") from error
        if sys.platform == "win32" and isinstance(error, PermissionError):
            raise PermissionError(
                f"{folder} cannot be replaced: on Windows none of its files may be open; close the programs and delete "
                "the tensors that read it, or choose another folder"
            ) from error
        raise
    _remove(old)


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
