"""A worker of a run: one of several processes that share its rows in one output folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from types import TracebackType

from dpp_lightning.experiments.claims import Claims
from dpp_lightning.experiments.run_lock import CLAIMS_FOLDER, RUN, WORKER, wait_for_run

REFERENCES = "references"  # the claim of the process that scores base and fine-tuned model
_ROWS, _REPORT, _REPORTED = "rows", "report", "reported"
_MOMENT, _LEAVING = 0.02, 100  # seconds between two tries to write or to leave, and tries to leave


class Worker:
    """What one process has claimed of a run that several make, and what it has made of it.

    A context manager: at its end all claims are given back, and the last worker removes what killed ones left. Before
    :meth:`enter` it claims nothing.

    Args:
        folder: of the rows and deltas.
        begins: called when it is known that the rows in the folder are of this run.

    Attributes:
        made: labels of the rows that this process has made.
        reports: this process writes the table and the plots.

    Raises:
        ValueError: the folder's claims are a link to another place.
    """

    def __init__(self, folder: Path, begins: Callable[[], None] | None = None) -> None:
        self.folder, self._begins = folder, begins
        self.made: list[str] = []
        self.reports = False
        self._claims = Claims(folder / CLAIMS_FOLDER)
        self._name = f"{WORKER}{token_hex(8)}"
        self._rows = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.entered:
                with suppress(OSError):  # the next run removes what is left
                    self._leave()
        finally:
            self._claims.let_all_go()

    def enter(self, note: Callable[[str], None]) -> None:
        """Keep runs that must be alone out of the folder from now on; wait first until there is none.

        Args:
            note: told that this process waits.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        wait_for_run(self._claims, self.folder, note, alone=False)
        if not self._claims.of_others(WORKER):
            self._claims.remove(but=RUN)  # what killed workers left
        self._claims.take(self._name)
        self._claims.let_go(RUN)

    @property
    def entered(self) -> bool:
        """Whether this process takes part; of several ranks the first alone does."""
        return self._claims.holds(self._name)

    def begin(self) -> None:
        """The rows in the folder are of this run, if there are any."""
        if self._begins is not None:
            self._begins()

    def take(self, name: str) -> bool:
        """Take the claim of rows, or of :data:`REFERENCES`; False where another worker has it."""
        return self._claims.take(name)

    def let_go(self, name: str) -> None:
        """Give a claim back."""
        self._claims.let_go(name)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else writes rows while the block runs."""
        while not self._claims.take(_ROWS):
            time.sleep(_MOMENT)
        try:
            yield
        finally:
            self._claims.let_go(_ROWS)

    def take_report(self, rows: int) -> bool:
        """Settle who writes the table and the plots: this process, if :attr:`reports` is set then.

        Args:
            rows: how many rows there are.

        Returns:
            Whether it is settled; not as long as another worker is at it.
        """
        if not self._claims.take(_REPORT):
            return False
        self._rows, file = rows, self._claims.folder / _REPORTED
        self.reports = not (file.is_file() and file.read_bytes() == str(rows).encode())
        if not self.reports:
            self._claims.let_go(_REPORT)
        return True

    def reported(self) -> None:
        """Say to the other workers that the table and the plots are written, if this process was to write them.

        Raises:
            OSError: that cannot be written.
        """
        if self.reports:
            (self._claims.folder / _REPORTED).write_bytes(str(self._rows).encode())

    def _leave(self) -> None:
        """The last worker of the folder removes what is left of all."""
        for _ in range(_LEAVING):
            if self._nobody_enters():
                self._claims.let_all_go(but=RUN)
                if not self._claims.of_others(WORKER):
                    self._claims.remove(but=RUN)
                return
            time.sleep(_MOMENT)

    def _nobody_enters(self) -> bool:
        """Take the claim of a run; on a full disk, which takes none, see that nobody has it."""
        try:
            return self._claims.take(RUN)
        except OSError:
            return not self._claims.of_others(RUN)
