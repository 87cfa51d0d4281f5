"""A trainer's evaluation loop, run once more in the middle of another job; the trainer's state is restored after it."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage, TrainerFn


class OneBatch(Sized):
    """A loader of one batch that is ready. It is no DataLoader, so Lightning does not give it another sampler."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])


def run_evaluation_loop(trainer: pl.Trainer, *, testing: bool, loader: Any = None) -> dict[str, Any]:
    """One pass of the validation or test loop over the weights as they stand.

    Nothing is logged, printed or shown in a progress bar, and afterwards the trainer's state, metrics and limits are as
    before. Callbacks are called as in any evaluation.

    Args:
        trainer: inside a fit, a validate or a test.
        testing: take the test loop.
        loader: data to evaluate on, all of it; default the loop's own loaders under the trainer's limits.

    Returns:
        The metrics that callbacks see, by name.
    """
    loop = trainer.test_loop if testing else trainer.validate_loop
    with (
        _metrics_restored(trainer),
        _silently_evaluating(trainer, loop, testing),
        _loader_replaced(trainer, loop, loader),
    ):
        loop.run()
        metrics = dict(trainer.callback_metrics)
        loop.teardown()
    return metrics


@contextmanager
def _metrics_restored(trainer: pl.Trainer) -> Iterator[None]:
    """Empty the trainer's metrics for one pass and put them back after it."""
    live: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
    saved = [(metrics, dict(metrics)) for metrics in live]
    for metrics in live:
        metrics.clear()
    try:
        yield
    finally:
        for metrics, before in saved:
            metrics.clear()
            metrics.update(before)


@contextmanager
def _silently_evaluating(trainer: pl.Trainer, loop: Any, testing: bool) -> Iterator[None]:
    """Put the trainer into its evaluating state, with loggers, printing and progress bar off, and back.

    The loop may be in the middle of a pass of the user's (``Trainer.validate``). So that the results of that pass and
    its record of which modules were training survive, the loop gets fresh ones for the extra pass.
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
def _loader_replaced(trainer: pl.Trainer, loop: Any, loader: Any) -> Iterator[None]:
    """Let the loop read another loader to its end, if one is given, in place of its own."""
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
