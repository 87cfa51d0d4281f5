"""The progress of a run on a terminal: rows done of all, the row in progress, the time left; a line for every row."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from dpp_lightning.callbacks.prune_run.progress import describe_result
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import Row
from dpp_lightning.experiments.terminal_tables import printable

_WEEK = 7 * 24 * 3600.0


class RowsBar:
    """Reports the rows of a :class:`dpp_lightning.callbacks.DeltaPruneCallback` by a progress bar and lines above it.

    It is a context manager: the bar is removed when the block ends.

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
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns,
            console=self._console,
            disable=not visible,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=_WEEK,
        )
        self._task = self._bar.add_task("", total=None)
        self._visible, self._pending, self._kept, self._made, self._row = visible, list[Row](), 0, 0, ""

    def __enter__(self) -> RowsBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Show the bar; the rows of an earlier run count as done."""
        self._pending, self._kept, self._made = list(pending), kept, 0
        if kept:
            self._print(f"{kept} rows were made before and are kept; {len(pending)} are left")
        if pending:
            self._describe("base and fine-tuned")
            self._bar.update(self._task, total=len(pending) + kept, completed=kept)
            self._bar.start()

    def row(self, result: Result, monitor: str) -> None:
        """Print a line for the row that was made, and show the next one beside the bar."""
        if result.pruning_rate is None:
            self._print(describe_result(result, monitor))
        else:
            self._made += 1
            self._bar.advance(self._task)
            self._print(
                f"[{self._kept + self._made}/{self._kept + len(self._pending)}] {describe_result(result, monitor)}"
            )
        if self._made < len(self._pending):
            method, rate, seed = self._pending[self._made]
            if self._made or result.method == "fine-tuned":
                self._describe(f"{method} p={rate:g} seed={seed}")
        else:
            self._bar.stop()

    def stage(self, text: str) -> None:
        """Show what is being done for the row in progress."""
        self._bar.update(self._task, description=f"{self._row}: {text}")

    def _describe(self, row: str) -> None:
        self._row = row
        self._bar.update(self._task, description=row)

    def _print(self, text: str) -> None:
        if self._visible:
            self._bar.console.print(Text(printable(text)))
