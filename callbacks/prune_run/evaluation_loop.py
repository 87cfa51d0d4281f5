"""An evaluation loop run inside another job of its trainer: all that the trainer knows is put back after it."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage, TrainerFn


class OneBatch(Sized):
    """A loader of one ready batch: an iterable that is no DataLoader, so no sampler is put into it."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])


@contextmanager
def metrics_kept(trainer: pl.Trainer) -> Iterator[None]:
    """Empty the trainer's metrics for one pass and give them back after it."""
    live: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
    kept = [(metrics, dict(metrics)) for metrics in live]
    for metrics, _ in kept:
        metrics.clear()
    try:
        yield
    finally:
        for metrics, before in kept:
            metrics.clear()
            metrics.update(before)


@contextmanager
def quiet(trainer: pl.Trainer, loop: Any, testing: bool) -> Iterator[None]:
    """Put the trainer into its evaluating state, with loggers, printing and progress bar off, and back.

    The loop may be inside a pass of the user's own (``Trainer.validate``): it gets results and a record of the modules'
    training mode of its own, so that those of the outer pass survive.
    """
    saved = (trainer.state.fn, trainer.state.stage, loop.verbose, trainer.loggers, loop._module_mode, loop._results)
    bar = trainer.progress_bar_callback
    bar_was_on = bool(getattr(bar, "is_enabled", bar is not None))
    if bar is not None:
        bar.disable()
    loop._module_mode, loop._results = type(loop._module_mode)(), type(loop._results)(training=False)
    trainer.state.fn = TrainerFn.TESTING if testing else TrainerFn.VALIDATING
    trainer.state.stage = RunningStage.TESTING if testing else RunningStage.VALIDATING
    loop.verbose, trainer.loggers = False, []
    try:
        yield
    finally:
        trainer.state.fn, trainer.state.stage, loop.verbose, trainer.loggers, loop._module_mode, loop._results = saved
        if bar is not None and bar_was_on:
            bar.enable()


@contextmanager
def reading(trainer: pl.Trainer, loop: Any, loader: Any) -> Iterator[None]:
    """Let the loop read another loader, whole, in place of its own."""
    if loader is None:
        yield
        return
    source, limit = loop._data_source, "limit_test_batches" if trainer.testing else "limit_val_batches"
    saved = (source.instance, getattr(trainer, limit))
    source.instance = loader
    setattr(trainer, limit, 1.0)
    try:
        yield
    finally:
        source.instance = saved[0]
        setattr(trainer, limit, saved[1])
        loop._combined_loader = None
