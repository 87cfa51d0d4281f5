"""One run at a time writes into an output folder: a second one, of another process, waits until the first has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".run.lock"


@contextmanager
def alone_in(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keep the runs of other processes out of a folder while the block runs; wait first until theirs has ended.

    The system lets go of the lock when its owner is killed. A file system without locks goes without.

    Args:
        folder: of the rows and deltas; it is made where there is none, and removed again if it stays empty.
        note: told that this run waits.

    Raises:
        OSError: the folder cannot be written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        with suppress(NotImplementedError):
            _acquire(lock, folder, note)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_FILE).unlink()  # while it is held, so that nobody locks a file that is about to go
        lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: FileLock, folder: Path, note: Callable[[str], None]) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"another run writes into {folder} at this moment: this one goes on when it has ended")
        lock.acquire()
    while not Path(lock.lock_file).exists():  # the run before removed the file that is locked now
        lock.release()
        lock.acquire()
