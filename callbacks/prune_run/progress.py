"""Who is told of the rows of a run as they are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_info

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import Row


class Reporter(Protocol):
    """Follows a run, on every rank."""

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """These rows are to be made, in this order; ``kept`` ones an earlier run has made."""

    def row(self, result: Result, monitor: str) -> None:
        """One more row is made: base, fine-tuned or the next of the pending ones."""


class Log:
    """Tells every row through Lightning's logger."""

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Say how many rows an earlier run has made."""
        if kept:
            rank_zero_info(f"{kept} rows were made before, {len(pending)} are left")

    def row(self, result: Result, monitor: str) -> None:
        """Say the row's score."""
        rank_zero_info(describe_result(result, monitor))


def describe_result(result: Result, monitor: str) -> str:
    """A row in one line."""
    what = result.method
    if result.pruning_rate is not None:
        what += f" p={result.pruning_rate:g} seed={result.seed}" + (f" q={result.q:.4g}" if result.q else "")
    return f"{what}: {monitor} {result.score:.4f} ({result.seconds:.1f} s)"
