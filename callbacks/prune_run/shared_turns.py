"""The turns of a worker: it claims rows that no other worker makes, and waits where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dpp_lightning.callbacks.prune_run.turns import Ranks, Step
from dpp_lightning.experiments.grid import Result, delta_name
from dpp_lightning.experiments.results import ResultsLog, rows_of
from dpp_lightning.experiments.row_groups import RowGroup
from dpp_lightning.experiments.sweep_worker import REFERENCES, Worker

_POLL = 0.5  # seconds between two looks at what the other workers have made
_NAMED = 4  # rows in a message


class PausingRanks(Ranks, Protocol):
    """The ranks of a process that can wait."""

    def pause(self, seconds: float) -> None:
        """Wait on all ranks, which must call, unless the process is to end."""
        ...


class Shared:
    """Several workers share the rows, each with its own process, which may have several ranks.

    Args:
        log: the file of the rows, which all workers append to.
        worker: of this process; the first rank alone has entered.
        ranks: of this process.
        note: told what is waited for.
    """

    def __init__(self, log: ResultsLog, worker: Worker, ranks: PausingRanks, note: Callable[[str], None]) -> None:
        self._log, self._worker, self._ranks, self._note = log, worker, ranks, note
        self._waiting = False

    def begin(self) -> tuple[list[Result], str]:
        """As for one process; waits as long as another worker scores base and fine-tuned model."""
        while (begun := self._ranks.from_first(self._begin)) is None:
            self._wait("waiting for the scores of base and fine-tuned model by another worker")
        self._waiting = False
        return begun

    def references_made(self) -> None:
        """Let the other workers go on."""
        self._worker.let_go(REFERENCES)

    def next(self, groups: Sequence[RowGroup], results: list[Result]) -> Step:
        """The first rows that nobody has made or makes; nothing for a while where others make all that are left."""
        step = self._ranks.from_first(lambda: self._step(groups))
        if step.group is not None or step.over:
            self._waiting = False
        else:
            done = rows_of(step.results)
            labels = [group.label for group in groups if not group.is_in(done)]
            more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
            self._wait(f"waiting for the rows of another worker: {', '.join(labels[:_NAMED])}{more}")
        return step

    def record(self, result: Result, monitor: str) -> None:
        """Append the row, unless another worker has made it meanwhile."""
        if not self._worker.entered:
            return
        with self._worker.writing():
            rows = self._log.resume()
            self._log.monitor = monitor
            if _key(result) not in map(_key, rows):
                self._log.append(result)

    def made(self, group: RowGroup) -> None:
        """Note the rows for the message at the end, and give them back."""
        self._worker.made.append(group.label)
        self._worker.let_go(_claim(group))

    def reports(self) -> bool:
        """For one of the workers; the others wait until it has done, and take its place if it is killed."""
        while (reports := self._ranks.from_first(self._reports)) is None:
            self._wait("waiting for the table of another worker")
        return reports

    def _begin(self) -> tuple[list[Result], str] | None:
        results = self._log.resume()
        if not _has_references(results):
            if not self._worker.take(REFERENCES):
                return None
            results = self._log.resume()  # they may have been made just before
            if _has_references(results):
                self._worker.let_go(REFERENCES)
        return results, self._log.monitor

    def _step(self, groups: Sequence[RowGroup]) -> Step:
        results = self._log.resume()
        done = rows_of(results)
        for group in groups:
            if group.is_in(done) or not self._worker.take(_claim(group)):
                continue
            results = self._log.resume()
            done = rows_of(results)
            if not group.is_in(done):  # else it was made just before
                return Step(results, group)
            self._worker.let_go(_claim(group))
        return Step(results, over=all(group.is_in(done) for group in groups))

    def _reports(self) -> bool | None:
        settled = self._worker.take_report(len(self._log.resume()))
        return self._worker.reports if settled else None

    def _wait(self, message: str) -> None:
        if not self._waiting:
            self._note(message)
            self._waiting = True
        self._ranks.pause(_POLL)


def _claim(group: RowGroup) -> str:
    return delta_name(*group.rows[0])


def _key(result: Result) -> tuple[str, float | None, int | None]:
    return result.method, result.pruning_rate, result.seed


def _has_references(results: Sequence[Result]) -> bool:
    return {"base", "fine-tuned"} <= {result.method for result in results}
