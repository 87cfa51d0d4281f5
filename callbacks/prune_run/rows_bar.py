"""The progress of a run on a terminal: rows done of all, the row in progress, the time left; a line for every row."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from dpp_lightning.callbacks.prune_run.progress import LogReporter, Reporter, describe_result
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.row_groups import Row
from dpp_lightning.storage.safe_text import printable


def rows_reporter(given: Reporter | None = None, *, shown: bool) -> AbstractContextManager[Reporter]:
    """A bar over the rows of a run where one is to be shown and standard error is a terminal, else a line for each row.

    Args:
        given: the user's own, which goes before either.
        shown: whether the trainer shows bars in this process.
    """
    if given is not None:
        return nullcontext(given)
    return RowsBar() if shown and sys.stderr.isatty() else nullcontext(LogReporter())


def seconds_left(made: int, pending: int, spent: float, current: float) -> float | None:
    """The time until the last row is made, if the rows to come take as long as those made took on average.

    Args:
        made: rows that this run, or other processes beside it, have made.
        pending: rows that they make in all.
        spent: seconds that the rows made took together.
        current: seconds since the last of them; a row that takes longer than the others adds nothing to the rest.

    Returns:
        Seconds; None before the first row.
    """
    if made >= pending:
        return 0.0
    if not made:
        return None
    mean = spent / made
    return max(mean - current, 0.0) + mean * (pending - made - 1)


class _TimeLeft(ProgressColumn):
    """Shows the time left in hours, minutes and seconds.

    Args:
        left: gives it in seconds, or None where it is not known.
    """

    def __init__(self, left: Callable[[], float | None]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        """The column's text."""
        left = self._left()
        text = "-:--:--" if left is None else str(timedelta(seconds=round(left)))
        return Text(text, style="progress.remaining")


class RowsBar:
    """Reports the rows of a callback that prunes by a line for each, and on a terminal by a progress bar below them.

    It is a context manager: the bar is removed after the last row, at the latest when the block ends.

    Args:
        visible: False on ranks other than the first, which report nothing.
        console: the terminal; default standard error.
    """

    def __init__(self, *, visible: bool = True, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            _TimeLeft(self._seconds_left),
        )
        self._bar = Progress(
            *columns,
            console=self._console,
            disable=not visible,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._visible, self._pending, self._kept, self._made, self._row = visible, 0, 0, 0, ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> RowsBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Show the bar if the console is a terminal; the rows of an earlier run count as done."""
        self._pending, self._kept, self._made = len(pending), kept, 0
        self._start = self._last = time.monotonic()
        if kept:
            self._print(f"{kept} rows were made before and are kept; {len(pending)} are left")
        if pending and self._console.is_terminal:
            self._describe("base and fine-tuned")
            self._bar.update(self._task, total=len(pending) + kept, completed=kept)
            self._bar.start()

    def next(self, row: Row | None, done: int) -> None:
        """Show the row beside the bar, and the rows that other processes have made in it."""
        if self._kept + self._made < done:
            self._made, self._last = done - self._kept, time.monotonic()
            self._bar.update(self._task, completed=done)
        if row is not None:
            method, rate, seed = row
            self._describe(f"{method} p={rate:g} seed={seed}")
        elif self._made < self._pending:
            self._describe("waiting")
        else:
            self._stop()

    def row(self, result: Result, monitor: str) -> None:
        """Print a line for the row that was made."""
        self._last = time.monotonic()
        if result.pruning_rate is None:
            self._start = self._last  # the rows' time begins when base and fine-tuned model are scored
            self._print(describe_result(result, monitor))
            return
        self._made += 1
        self._bar.advance(self._task)
        self._print(f"[{self._kept + self._made}/{self._kept + self._pending}] {describe_result(result, monitor)}")
        if self._made >= self._pending:
            self._stop()

    def stage(self, text: str) -> None:
        """Show what is being done for the row in progress."""
        self._bar.update(self._task, description=f"{self._row}: {text}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text)

    def _stop(self) -> None:
        if self._bar.live.is_started:  # rich would print an empty line where it was not
            self._bar.stop()

    def _seconds_left(self) -> float | None:
        current = time.monotonic() - self._last
        return seconds_left(self._made, self._pending, self._last - self._start, current)

    def _describe(self, row: str) -> None:
        self._row = row
        self._bar.update(self._task, description=row)

    def _print(self, text: str) -> None:
        if self._visible:
            self._bar.console.print(Text(printable(text)))
