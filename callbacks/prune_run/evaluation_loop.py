"""A trainer's evaluation loop, run once more in the middle of another job; the trainer's state is restored after it."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader


class OneBatch(Sized):
    """A loader of one batch that is ready. It is no DataLoader, so Lightning does not give it another sampler."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])


class NoBatches:
    """A loader that stands in the place of one that is not read; without a length, so Lightning does not warn of 0."""

    def __iter__(self) -> Iterator[Any]:
        return iter([])


def run_evaluation_loop(
    trainer: pl.Trainer, *, testing: bool, loader: Any = None, index: int = 0, trying: bool = False
) -> tuple[dict[str, Any], int]:
    """One pass of the validation or test loop over the weights as they stand.

    The module's hooks and steps run, those of no callback do: one that swaps weights in an evaluation, as Lightning's
    ``WeightAveraging`` does, would have its own weights evaluated. Nothing is logged, printed or shown in a progress
    bar, and afterwards the trainer's state, metrics and limits are as before.

    Args:
        trainer: inside a fit, a validate or a test.
        testing: take the test loop.
        loader: data to evaluate on, all of it; default the loop's own loaders under the trainer's limits.
        index: in place of which of the loop's loaders ``loader`` is read, if steps take the loader's index.
        trying: let the module take the pass for Lightning's sanity check, which keeps no metrics of several loaders.

    Returns:
        The metrics that the module logged in the pass, by name, and the number of loaders that steps and metrics
        distinguish.
    """
    loop = trainer.test_loop if testing else trainer.validate_loop
    with (
        _callbacks_resting(trainer),
        _metrics_restored(trainer) as before,
        _silently_evaluating(trainer, loop, testing, trying),
        _loader_replaced(trainer, loop, loader, index),
    ):
        loop.run()
        metrics = {name: value for name, value in trainer.callback_metrics.items() if before.get(name) is not value}
        count = _count_loaders(loop)
        loop.teardown()
    return metrics, count


@contextmanager
def _callbacks_resting(resting: pl.Trainer) -> Iterator[None]:
    """Call no hook of any callback of a trainer.

    ``trainer.callbacks`` stays as it is, since a module may look for a callback of its trainer in its own hooks.
    """
    call_hooks = call._call_callback_hooks

    def call_hooks_of_others(
        trainer: pl.Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
    ) -> None:
        if trainer is not resting:
            call_hooks(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)

    call._call_callback_hooks = call_hooks_of_others
    try:
        yield
    finally:
        call._call_callback_hooks = call_hooks


@contextmanager
def _metrics_restored(trainer: pl.Trainer) -> Iterator[dict[str, Any]]:
    """Put the trainer's metrics back after one pass, in which hooks may read them; yields them as they were."""
    live: list[dict[str, Any]] = [trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics]
    saved = [(metrics, dict(metrics)) for metrics in live]
    try:
        yield saved[0][1]
    finally:
        for metrics, before in saved:
            metrics.clear()
            metrics.update(before)


@contextmanager
def _silently_evaluating(trainer: pl.Trainer, loop: Any, testing: bool, trying: bool) -> Iterator[None]:
    """Put the trainer into its evaluating state, with loggers and printing off, and back.

    The loop may be in the middle of a pass of the user's (``Trainer.validate``). So that the results of that pass and
    its record of which modules were training survive, the loop gets fresh ones for the extra pass.
    """
    saved = (trainer.state.fn, trainer.state.stage, loop.verbose, trainer.loggers, loop._module_mode, loop._results)
    sanity_steps = trainer.num_sanity_val_steps
    loop._module_mode, loop._results = type(loop._module_mode)(), type(loop._results)(training=False)
    trainer.state.fn = TrainerFn.TESTING if testing else TrainerFn.VALIDATING
    trainer.state.stage = RunningStage.TESTING if testing else RunningStage.VALIDATING
    if trying:
        trainer.state.stage, trainer.num_sanity_val_steps = RunningStage.SANITY_CHECKING, float("inf")
    loop.verbose, trainer.loggers = False, [DummyLogger()] if trainer.loggers else []  # a module may log by its own
    try:
        yield
    finally:
        trainer.state.fn, trainer.state.stage, loop.verbose, trainer.loggers, loop._module_mode, loop._results = saved
        trainer.num_sanity_val_steps = sanity_steps


@contextmanager
def _loader_replaced(trainer: pl.Trainer, loop: Any, loader: Any, index: int) -> Iterator[None]:
    """Let the loop read another loader to its end, if one is given, in place of its own."""
    source = loop._data_source
    if loader is None:
        given = source.instance
        if isinstance(given, CombinedLoader):  # the fit's own loop holds it, and goes on with it
            source.instance = CombinedLoader(given.iterables, given._mode)
        try:
            yield
        finally:
            source.instance = given
        return
    limit = "limit_test_batches" if trainer.testing else "limit_val_batches"
    saved = (source.instance, getattr(trainer, limit))
    if loop._combined_loader is None:
        loop.setup_data()
    count = _count_loaders(loop)
    # steps that take the index of their loader get one here too
    source.instance = loader if count == 1 else [loader if i == index else NoBatches() for i in range(count)]
    setattr(trainer, limit, 1.0)
    try:
        yield
    finally:
        source.instance = saved[0]
        setattr(trainer, limit, saved[1])
        loop._combined_loader = None


def _count_loaders(loop: Any) -> int:
    """The number of loaders that steps distinguish; 1 where a batch is of all of them at once."""
    return loop.num_dataloaders if loop._is_sequential else 1
