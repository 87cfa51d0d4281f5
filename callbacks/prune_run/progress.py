"""What a run reports: every row as it is made, and at its end a table, metrics for loggers and a plot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from dpp_lightning.callbacks.prune_run.fit_notices import metric_prefix
from dpp_lightning.callbacks.prune_run.logger_report import RunReport, boards_of_lightning, show_run
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.experiments.grid import QCurve, Result, mean_and_deviation
from dpp_lightning.experiments.plots import plot_over_q
from dpp_lightning.experiments.results import PLOT_FILE
from dpp_lightning.experiments.row_groups import Row, rate_text
from dpp_lightning.experiments.tables import console_table, seconds_text

RESULTS_FILE = "results.jsonl"
SECONDS_OF_SILENCE = 60


class Reporter(Protocol):
    """Follows a run as it goes on. It is called on every rank."""

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """The run begins.

        Args:
            pending: the rows to be made, in order.
            kept: how many rows an earlier run has made.
        """

    def next(self, row: Row | None, done: int) -> None:
        """A row is made next.

        Args:
            row: one of the pending ones; None where other processes make all that are left, and this one waits.
            done: how many rows there are by now, those of an earlier run and of other processes included.
        """

    def row(self, result: Result, monitor: str) -> None:
        """A row was made: the base, the fine-tuned model, or the one that :meth:`next` named.

        Args:
            result: the row.
            monitor: name of its score.
        """

    def note(self, text: str) -> None:
        """Something is to be known of the run.

        Args:
            text: a line.
        """

    def stage(self, text: str) -> None:
        """Something is tried for the row in progress.

        Args:
            text: what, such as ``candidate 7``.
        """


class LogReporter:
    """Reports every row through Lightning's logger of messages, and once a minute what is tried for one."""

    def __init__(self) -> None:
        self._told, self._row = time.monotonic(), ""

    def begin(self, pending: Sequence[Row], kept: int) -> None:
        """Report how many rows an earlier run has made."""
        if kept:
            rank_zero_info(f"{kept} rows were made before, {len(pending)} are left")

    def next(self, row: Row | None, done: int) -> None:
        """Nothing yet: its line comes when it is made."""
        self._row = "" if row is None else f"{row[0]} p={row[1]:g} seed={row[2]}: "

    def row(self, result: Result, monitor: str) -> None:
        """Report the row's score."""
        self._told = time.monotonic()
        rank_zero_info(describe_result(result, monitor))

    def note(self, text: str) -> None:
        """Report the line."""
        rank_zero_info(text)

    def stage(self, text: str) -> None:
        """Report it where the last line is a minute old: there may be hundreds, and a log should show a long fit."""
        if time.monotonic() - self._told >= SECONDS_OF_SILENCE:
            self._told = time.monotonic()
            rank_zero_info(self._row + text)


def describe_result(result: Result, monitor: str) -> str:
    """A row in one line."""
    model = result.method
    if result.pruning_rate is not None:
        model += f" p={result.pruning_rate:g} seed={result.seed}" + (f" q={result.q:.4g}" if result.q else "")
    return f"{model}: {monitor} {result.score:.4f} ({seconds_text(result.seconds)} s)"


def report_carried(tensors: dict[str, torch.Tensor], reporter: Reporter) -> None:
    """Report what every delta holds besides pruned tensors: a decoder's embeddings may be most of its bytes.

    Args:
        tensors: the tensors that are stored dense, by canonical name.
        reporter: gets the line.
    """
    if tensors:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        names = list(tensors)
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        reporter.note(f"stored dense in every delta, {size:,} bytes: {shown}")


def mean_scores(
    results: Sequence[Result], settings: PruneSettings, monitor: str, prefix: str = "dpp"
) -> dict[str, float]:
    """Mean and sample deviation over seeds for every method and rate, under the names that loggers get.

    Args:
        results: the rows.
        settings: of the callback.
        monitor: name of the score.
        prefix: of the names.
    """
    metrics: dict[str, float] = {}
    for method in settings.methods:
        for rate in settings.rates:
            scores = [r.score for r in results if r.method == method and r.pruning_rate == rate]
            key = f"{prefix}/{method}/{rate_text(rate)}/{monitor}"
            metrics[key], metrics[f"{key}_std"] = mean_and_deviation(scores)
    return metrics


def report_results(
    results: Sequence[Result],
    curves: Sequence[QCurve],
    folder: Path,
    settings: PruneSettings,
    trainer: pl.Trainer,
    monitor: str,
) -> None:
    """Report all rows: a table on the console, a plot of the curves, metrics for ``callback_metrics`` and loggers.

    Args:
        results: the rows of base and fine-tuned model, then of the pruned ones.
        curves: score and output change over q, possibly none.
        folder: for the plot.
        settings: of the callback.
        trainer: whose loggers are written to. All ranks call, rank 0 writes.
        monitor: name of the score.
    """
    prefix = metric_prefix(settings, trainer)  # a collective
    metrics = mean_scores(results, settings, monitor, prefix)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()
    if not trainer.is_global_zero:
        return
    console_table(results, monitor)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info("fast_dev_run: each method was tried at one rate and seed, and nothing was saved")
        return
    figures = save_plot_and_name_files(results, curves, folder, settings, monitor)
    show_run(boards_of_lightning(trainer.loggers), RunReport(results, figures, prefix, trainer.global_step))


def save_plot_and_name_files(
    results: Sequence[Result], curves: Sequence[QCurve], folder: Path, settings: PruneSettings, monitor: str
) -> list[Path]:
    """Plot the curves over q into the folder, if there are any, and tell what was written there.

    Args:
        results, curves, folder, settings, monitor: as for :func:`report_results`.

    Returns:
        The files of pictures.
    """
    if curves:
        base, finetuned = (row.score for row in results[:2])
        plot_over_q(curves, folder / PLOT_FILE, monitor=monitor, finetuned=finetuned, base=base)
    written = f"deltas and {RESULTS_FILE}" if settings.save_deltas else RESULTS_FILE
    rank_zero_info(f"{written} are in {folder}")
    return [folder / PLOT_FILE] if curves else []
