"""Which process makes which rows of a run: one makes all of them, or several workers share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import ResultsLog, rows_of
from dpp_lightning.experiments.row_groups import RowGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What comes next.

    Attributes:
        results: the rows so far, those of other processes included.
        group: rows that this process makes now; None for none.
        over: nothing is left to be made, by any process.
    """

    results: list[Result]
    group: RowGroup | None = None
    over: bool = False


class Ranks(Protocol):
    """The ranks of one process of a run."""

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first rank computes, on all of them, or the error that it raises; all must call."""
        ...


class Turns(Protocol):
    """All ranks of a run call, in the same order; what they get is what the first one decides."""

    def begin(self) -> tuple[list[Result], str]:
        """The rows so far, and the name of their score; base and fine-tuned model are scored by this process if they
        are not among the rows.

        Raises:
            ValueError: the rows are of another run.
        """
        ...

    def references_made(self) -> None:
        """The rows of base and fine-tuned model are recorded."""
        ...

    def next(self, groups: Sequence[RowGroup], results: list[Result]) -> Step:
        """What comes next, after a moment in which other processes may have made rows.

        Args:
            groups: of the run, in order.
            results: the rows that are known.
        """
        ...

    def record(self, result: Result, monitor: str) -> None:
        """Write a row.

        Args:
            result: the row.
            monitor: name of its score.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def made(self, group: RowGroup) -> None:
        """The rows of the group that came next are recorded."""
        ...

    def reports(self) -> bool:
        """Whether this process reports the rows, now that all are made."""
        ...


class Alone:
    """One process makes all rows.

    Args:
        log: the file of the rows.
        ranks: of this process.
        resume: the rows in the file are kept.
        writes: this rank appends rows to the file.
    """

    def __init__(self, log: ResultsLog, ranks: Ranks, *, resume: bool, writes: bool) -> None:
        self._log, self._ranks, self._resume, self._writes = log, ranks, resume, writes

    def begin(self) -> tuple[list[Result], str]:
        """The rows of an earlier run, if it is resumed."""
        if not self._resume:
            return [], self._log.monitor
        return self._ranks.from_first(lambda: (self._log.resume(), self._log.monitor))

    def references_made(self) -> None:
        """Nothing: nobody waits for them."""

    def next(self, groups: Sequence[RowGroup], results: list[Result]) -> Step:
        """The first group that is not made."""
        done = rows_of(results)
        group = next((group for group in groups if not group.is_in(done)), None)
        return Step(results, group, over=group is None)

    def record(self, result: Result, monitor: str) -> None:
        """Append the row."""
        self._log.monitor = monitor
        if self._writes:
            self._log.append(result)

    def made(self, group: RowGroup) -> None:
        """Nothing: nobody waits for it."""

    def reports(self) -> bool:
        """Yes."""
        return True
