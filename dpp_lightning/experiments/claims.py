"""Names in a folder, each of which one process at a time holds, on one machine or on several that see the folder.

A claim is a small file that is made exclusively and touched every 15 seconds by a thread of its holder. That of a
process that is gone is taken over at once on the same machine. On another machine, or where the process was killed and
its parent has not collected it, it is taken over when it was not touched for two minutes, by the clock of the one that
waits. So nothing is asked of the file system but that a file can be made exclusively and renamed, and that others see
it and its time of change: local disks, NFS from version 3 on, Lustre, GPFS and BeeGFS do that. Locks of the system,
which on some of these do not reach other machines, are not used.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

EXPIRES, RENEWED = 120.0, 15.0  # seconds; the first must be the same for all processes
_TORN = 5.0  # seconds after which a claim that says nothing is certainly taken over


class Claims:
    """The claims of one folder, as one process sees them.

    Args:
        folder: of the files, and of nothing else; made with the first claim.

    Raises:
        ValueError: the folder is a link to another place, where nothing may be removed.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link, and files are made and removed in it: remove the link")
        self.folder = folder
        self._leases: dict[str, SoftFileLease] = {}  # also of claims of others, to know how old they are

    def take(self, name: str) -> bool:
        """Take a claim, or keep one that this object holds; False where another holder lives.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.holds(name):
            return True
        if name not in self._leases:
            path = self.folder / name
            self._leases[name] = SoftFileLease(path, lease_duration=EXPIRES, heartbeat_interval=RENEWED)
        try:
            self._leases[name].acquire(timeout=0)
        except Timeout:
            self._mark_if_empty(self.folder / name)
            return False
        except FileNotFoundError:  # the folder was removed at this moment
            return False
        return True

    def holds(self, name: str) -> bool:
        """Whether this object has the claim."""
        lease = self._leases.get(name)
        return lease is not None and lease.is_locked

    def let_go(self, name: str) -> None:
        """Give a claim back, if it is held; one that cannot be removed is dead when this process has ended."""
        lease = self._leases.pop(name, None)
        if lease is not None:
            with suppress(OSError):
                lease.release(force=True)

    def of_others(self, prefix: str) -> list[str]:
        """Names that begin so and that others hold; those of holders that are gone are removed."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        names = [name for name in names if name.startswith(prefix) and not self.holds(name)]
        living, end = [], time.monotonic() + _TORN
        for name in names:
            while not (taken := self.take(name)) and self._leases[name].owner is None and time.monotonic() < end:
                time.sleep(0.1)  # it was torn by a kill, or is written at this moment
            if taken:
                self.let_go(name)
            else:
                living.append(name)
        return living

    def remove(self, *, but: str) -> None:
        """Remove all files but that of one claim, which this object holds; nobody else is at work, as it knows."""
        for path in self.folder.iterdir():
            if path.name != but:
                with suppress(OSError):
                    path.unlink()

    @staticmethod
    def _mark_if_empty(path: Path) -> None:
        """Have a claim whose maker was killed before it wrote into it taken for a torn one; an empty one never is."""
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        with suppress(OSError), open(os.open(path, flags), "r+b") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0 and time.time() - status.st_mtime > 1:
                file.write(b"?\n")

    def let_all_go(self, *, but: str | None = None) -> None:
        """Give all claims back but possibly one, and remove the folder if nobody has any."""
        for name in list(self._leases):
            if name != but:
                self.let_go(name)
        with suppress(OSError):
            self.folder.rmdir()
