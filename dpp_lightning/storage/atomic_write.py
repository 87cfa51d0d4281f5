"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

A folder that replaces another changes names with it in one step where the system can (Linux, macOS). Elsewhere it
takes two renames, and what a machine that stops between them leaves, the old folder as ``.NAME.….old``, is put back by
the next run into that place. Temporary folders of a run that was killed are removed by the next one: a lock beside each
says whether its owner lives. On Windows a folder has no sync of its own, and nothing is replaced while one of its files
is open or mapped.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_HERE, _EXCHANGE, _SWAP = -100, 2, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # file systems that cannot exchange names


@contextmanager
def atomic_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends without an exception.

    Args:
        folder: the final name, absolute and no link; parents are made. What it holds is replaced, whatever it is.
        check: raises if that may not be; called at the start, and once more before the name is taken.

    Raises:
        OSError: it cannot be written, or on Windows replaced while a file in it is open.
    """
    _tidy(folder)
    check()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with _owned(temporary):
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


@contextmanager
def _owned(temporary: Path) -> Iterator[None]:
    """A lock beside a temporary folder while the block runs, which the system lets go when its owner is killed.

    Where the file system has no locks there is none, and nobody removes what a killed run leaves.
    """
    lock = FileLock(_lock_of(temporary))
    try:
        with suppress(NotImplementedError, OSError):
            lock.acquire()
        if not lock.is_locked:
            _lock_of(temporary).unlink(missing_ok=True)  # else another run takes it, and the folder for left over
        yield
    finally:
        lock.release()
        _lock_of(temporary).unlink(missing_ok=True)


def _lock_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.lock")


def _old_of(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name}.old")


def _tidy(folder: Path) -> None:
    """Remove what killed runs left beside a folder; where one was killed between two renames, put the old one back."""
    for name in glob.glob(f".{glob.escape(folder.name)}.*.lock", root_dir=folder.parent):
        lock = FileLock(folder.parent / name, timeout=0)
        try:
            with lock:
                temporary = folder.parent / name.removesuffix(".lock")
                if _old_of(temporary).exists() and not folder.exists():
                    _old_of(temporary).replace(folder)
                for left in (temporary, _old_of(temporary)):
                    shutil.rmtree(left, ignore_errors=True)
                (folder.parent / name).unlink(missing_ok=True)
        except (Timeout, NotImplementedError, OSError):
            continue  # its owner lives, or nothing can be locked or removed here


def _take_name(temporary: Path, folder: Path) -> None:
    """Give the temporary folder its name; what had the name before is removed."""
    if not folder.exists():
        temporary.replace(folder)
    elif not _exchanged(temporary, folder):
        _replace_in_two_steps(temporary, folder)
    try:
        _sync(folder.parent)
    except OSError as error:
        raise OSError(
            error.errno, f"{folder} is written and has its name, but the system does not confirm that: {error.strerror}"
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
