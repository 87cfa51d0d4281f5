"""Who writes into an output folder: one run alone, while others wait, or several workers that share the rows of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpp_lightning.experiments.claims import Claims

CLAIMS_FOLDER = ".claims"
RUN, WORKER = "run", "worker-"  # the claim of a run that is alone, and what those of workers begin with
_POLL, _PATIENCE = 0.2, 3  # seconds between two tries, and tries without a message


@contextmanager
def alone_in(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Keep the runs of other processes out of a folder while the block runs; wait first until theirs have ended.

    Args:
        folder: of the rows and deltas; it is made where there is none, and removed again if it stays empty.
        note: told that this run waits.

    Raises:
        OSError: the folder cannot be written.
        ValueError: its claims are a link to another place.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    claims = Claims(folder / CLAIMS_FOLDER)
    try:
        wait_for_run(claims, folder, note, alone=True)
        try:
            yield
        finally:
            claims.remove(but=RUN)
    finally:
        claims.let_all_go()
        if made:
            with suppress(OSError):
                folder.rmdir()


def wait_for_run(claims: Claims, folder: Path, note: Callable[[str], None], *, alone: bool) -> None:
    """Take the claim of a run, as soon as no run is alone in the folder.

    Args:
        claims: of the folder.
        folder: the output folder, for the message.
        note: told that this process waits, where it is for more than a moment.
        alone: also wait until no worker is in the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    tries = 0
    while not _take_run(claims, alone=alone):
        tries += 1
        if tries == _PATIENCE:  # workers that come and go hold it for a moment
            note(f"another run writes into {folder} at this moment: this one goes on when it has ended")
        time.sleep(_POLL)


def _take_run(claims: Claims, *, alone: bool) -> bool:
    if not claims.take(RUN):
        return False
    if alone and claims.of_others(WORKER):
        claims.let_go(RUN)
        return False
    return True
