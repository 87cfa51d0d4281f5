"""What a Lightning ``Trainer`` shows of its progress."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def finish_bar(trainer: pl.Trainer) -> None:
    """Close the bar of the training that has ended, so that it is not drawn again below what a run prints.

    ``TQDMProgressBar`` has closed its own by then; ``RichProgressBar`` does so only when the trainer is torn down.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar._stop_progress()
        bar.progress = None  # nor an empty line when Lightning stops it once more


def shows_bars(trainer: pl.Trainer) -> bool:
    """Whether the trainer shows progress bars in this process."""
    bar = trainer.progress_bar_callback
    return bar is not None and bool(getattr(bar, "is_enabled", True)) and trainer.is_global_zero
