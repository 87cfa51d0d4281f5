"""The progress bar of a sweep: rows done of all, the row in progress, the time left, and a line for every row made."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dpp_lightning.callbacks.prune_run.progress import describe_result
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import Row

_WEEK = 7 * 24 * 3600.0


class Bar:
    """A reporter of :class:`dpp_lightning.callbacks.DeltaPruneCallback` on standard error; ``with`` closes it.

    Args:
        shown: False on ranks other than the first.
        console: where to; default standard error.
    """

    def __init__(self, *, shown: bool = True, console: Console | None = None) -> None:
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
            disable=not shown,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=_WEEK,
        )
        self._task = self._bar.add_task("", total=None)
        self._shown, self._pending, self._kept, self._made = shown, list[Row](), 0, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Show the bar, with the rows of an earlier run done already."""
        self._pending, self._kept, self._made = list(pending), kept, 0
        if kept:
            self._say(f"{kept} rows were made before and are kept; {len(pending)} are left")
        if pending:
            self._bar.update(self._task, total=len(pending) + kept, completed=kept, description="base and fine-tuned")
            self._bar.start()

    def row(self, result: Result, monitor: str) -> None:
        """Say the row, and show the next one."""
        if result.pruning_rate is None:
            self._say(describe_result(result, monitor))
        else:
            self._made += 1
            self._bar.advance(self._task)
            self._say(
                f"[{self._kept + self._made}/{self._kept + len(self._pending)}] {describe_result(result, monitor)}"
            )
        if self._made < len(self._pending):
            method, rate, seed = self._pending[self._made]
            if self._made or result.method == "fine-tuned":
                self._bar.update(self._task, description=f"{method} p={rate:g} seed={seed}")
        else:
            self._bar.stop()

    def _say(self, text: str) -> None:
        if self._shown:
            self._bar.console.print(text, markup=False)
