"""How far a run in a Hugging Face ``Trainer`` is, shown by a bar of the trainer's own kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from dpp_lightning.callbacks.prune_run.progress import describe_result
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import Row


class RowsBar:
    """A ``tqdm`` bar over the rows of a run, as the trainer has one over its steps, with a line above it for each row.

    Args:
        visible: False in processes other than the first, which show nothing.
    """

    def __init__(self, *, visible: bool = True) -> None:
        self._visible = visible
        self._pending: list[str] = []
        self._row = "base and fine-tuned"
        self._bar: Any = None

    def __enter__(self) -> RowsBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Show the bar; the rows of an earlier run count as done."""
        self._pending = [f"{method} p={rate:g} seed={seed}" for method, rate, seed in pending]
        total = kept + len(pending)
        hidden = not self._visible or not pending
        self._bar = tqdm(total=total, initial=kept, desc=self._row, leave=False, disable=hidden)

    def stage(self, text: str) -> None:
        """Show what is being done for the row in progress."""
        if self._bar is not None:
            self._bar.set_description(f"{self._row}: {text}")

    def row(self, result: Result, monitor: str) -> None:
        """Write a line for the row that was made, and show the next one beside the bar, which goes after the last."""
        assert self._bar is not None
        if self._visible:
            self._bar.write(describe_result(result, monitor), file=sys.stderr)
        if result.pruning_rate is not None:
            self._bar.update()
        if result.method != "base" and self._pending:
            self._row = self._pending.pop(0)
            self._bar.set_description(self._row)
        elif not self._pending:
            self._bar.close()
