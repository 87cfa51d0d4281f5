"""What a Lightning ``Trainer`` shows of its progress, and a run's own bar in its place."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from dpp_lightning.callbacks.prune_run.progress import LogReporter, Reporter
from dpp_lightning.callbacks.prune_run.rows_bar import RowsBar


def finish_bar(trainer: pl.Trainer) -> None:
    """Close the bar of the training that has ended, so that it is not drawn again below what a run prints."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar._stop_progress()
        bar.progress = None  # nor an empty line when Lightning stops it once more
    elif isinstance(bar, TQDMProgressBar) and bar._train_progress_bar is not None:
        bar._train_progress_bar.close()


def rows_reporter(trainer: pl.Trainer) -> AbstractContextManager[Reporter]:
    """A bar over the rows of a run where the trainer shows bars on a terminal, else a line for every row."""
    bar = trainer.progress_bar_callback
    shown = bar is not None and getattr(bar, "is_enabled", True) and trainer.is_global_zero and sys.stderr.isatty()
    return RowsBar() if shown else nullcontext(LogReporter())
