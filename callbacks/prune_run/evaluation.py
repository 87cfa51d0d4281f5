"""Extra passes of a trainer's own evaluation loop, in place: the module's own steps, hooks and metrics score it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.output_change import Reduce, recorded_outputs
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.callbacks.prune_run.evaluation_loop import OneBatch, metrics_kept, quiet, reading
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.tensors.shards import reshard

ForwardFn = Callable[[pl.LightningModule, Any], Tensor]

_NO_LOGITS = (
    "darex-learned needs logits with gradients: give {} a forward(batch) that returns them (got {}), or pass "
    "DeltaPruneCallback(forward_fn=...)"
)


class Passes:
    """Runs the validation (or test) loop of a trainer without the trainer noticing.

    No logger is written, ModelCheckpoint and EarlyStopping do not react (the trainer is not in its fitting state
    meanwhile); training mode, random state, limits and metrics are as before. All ranks must call.

    Args:
        trainer: inside a fit, a validate or a test.
        monitor: name of the logged metric that is the score.
    """

    def __init__(self, trainer: pl.Trainer, monitor: str) -> None:
        self.trainer = trainer
        self.testing = trainer.state.fn == TrainerFn.TESTING
        self.monitor = monitor
        if self.testing and monitor.startswith("val_"):
            self.monitor = "test_" + monitor.removeprefix("val_")

    @property
    def split(self) -> str:
        """Name of the scored split."""
        return "test" if self.testing else "validation"

    def score(self, loader: Any = None) -> float:
        """The monitored metric of the weights as they stand, on the scored split or on another loader.

        Raises:
            ValueError: the metric was not logged.
        """
        # the first rank's on all ranks: they decide alike what comes next
        return float(self.trainer.strategy.broadcast(read_monitor(self._run(loader), self.monitor)))

    def inputs(self, batch: Any, forward_fn: ForwardFn | None = None) -> dict[str, InputStatistics]:
        """What every weight sees as input on one batch, by canonical name; warns of weights that no call reaches."""
        with collected_inputs(self.trainer.lightning_module) as collector:
            if forward_fn is not None:
                self._called(batch, forward_fn)
            else:
                for _ in self._steps(batch):
                    pass
        if collector.uncalled:
            rank_zero_warn(
                f"nothing is known of the inputs of {len(collector.uncalled)} weights, which the evaluation step does "
                f"not reach by calling their modules: {', '.join(collector.uncalled[:8])}; they are ranked by their "
                "delta alone"
            )
        return collector.statistics

    def outputs(self, batch: Any, layer: str | None, forward_fn: ForwardFn | None, reduce: Reduce) -> list[Tensor]:
        """What the output layer returns on one batch, in the module's own steps (or ``forward_fn``).

        Args:
            batch: of the module's own kind.
            layer: name of the submodule; None the last with parameters.
            forward_fn: in place of the module's steps.
            reduce: applied to each output, with its number, before it is kept.
        """
        if forward_fn is not None:
            return [reduce(0, self._called(batch, forward_fn))]
        kept: list[Tensor] = []
        with recorded_outputs(self.trainer.lightning_module, layer) as outputs:
            for places in self._steps(batch):
                while outputs:
                    output = outputs.pop(0)
                    # what a module says is padding takes no part
                    real = output if places is None or output.shape[:2] != places.shape else output[places]
                    kept.append(reduce(len(kept), real))
        if not kept:
            raise ValueError(f"the output layer {layer!r} was not called in the evaluation step; set output_layer=")
        return kept

    def learner(self, batch: Any, forward_fn: ForwardFn | None) -> BatchGradients:
        """Gradients on one batch: of ``forward_fn``, or of the module called with the batch (or the first of a pair).

        Raises:
            ValueError: the module cannot be called so, or the batch is too small.
        """
        trainer, module = self.trainer, self.trainer.lightning_module

        def forward(piece: Any) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return forward_fn(module, piece) if forward_fn else _logits(module, piece)

        return BatchGradients(module, trainer.strategy.batch_to_device(batch), forward)

    def _steps(self, batch: Any) -> Iterator[Tensor | None]:
        """One batch through the module: its ``calibration_steps`` where it has them, else its evaluation step.

        Yields:
            After each forward the places (samples, tokens) that count, None for all.
        """
        module = self.trainer.lightning_module
        steps = getattr(module, "calibration_steps", None)
        if steps is None:
            self._run(OneBatch(batch))
            yield None
            return
        with self._evaluating(module):
            yield from steps(self.trainer.strategy.batch_to_device(batch))

    def _called(self, batch: Any, forward_fn: ForwardFn) -> Tensor:
        """The output of ``forward_fn`` on one batch."""
        module = self.trainer.lightning_module
        with self._evaluating(module):
            return forward_fn(module, self.trainer.strategy.batch_to_device(batch)).detach().clone()

    @contextmanager
    def _evaluating(self, module: pl.LightningModule) -> Iterator[None]:
        training = module.training
        module.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            try:
                yield
            finally:
                module.train(training)
                reshard(module)

    def _run(self, loader: Any) -> dict[str, Any]:
        """One pass; returns the metrics as callbacks see them."""
        trainer = self.trainer
        loop = trainer.test_loop if self.testing else trainer.validate_loop
        with isolate_rng(), metrics_kept(trainer), quiet(trainer, loop, self.testing), reading(trainer, loop, loader):
            loop.run()
            metrics = dict(trainer.callback_metrics)
            loop.teardown()
        reshard(trainer.lightning_module)
        return metrics


def check_callable(module: pl.LightningModule) -> None:
    """Refuse a module that cannot be called, where the gradients of its outputs are wanted.

    Raises:
        ValueError: it has no ``forward``.
    """
    if type(module).forward is pl.LightningModule.forward:
        raise ValueError(_NO_LOGITS.format(type(module).__name__, "no forward"))


def _logits(module: pl.LightningModule, batch: Any) -> Tensor:
    output = module(batch[0] if isinstance(batch, tuple | list) else batch)
    if not isinstance(output, Tensor):
        raise ValueError(_NO_LOGITS.format(type(module).__name__, type(output).__name__))
    return output


def read_monitor(metrics: dict[str, Any], monitor: str) -> float:
    """The value of a metric, also where several loaders gave it a suffix (the first loader's then).

    Raises:
        ValueError: it was not logged; lists what was.
    """
    for name in (monitor, f"{monitor}/dataloader_idx_0"):
        if name in metrics:
            return float(metrics[name])
    raise ValueError(
        f"monitor={monitor!r} was not logged in the evaluation step; logged were {sorted(metrics) or 'no metrics'}. "
        "Log it with self.log in validation_step (on_epoch) or set monitor= to one of these"
    )


def check_logged(trainer: pl.Trainer, monitor: str) -> None:
    """One validation batch, to see that the score is logged: the sanity check may be off, a resumed fit skips it.

    Raises:
        ValueError: it is not.
    """
    limit = trainer.limit_val_batches
    trainer.limit_val_batches = 1
    try:
        Passes(trainer, monitor).score()
    finally:
        trainer.limit_val_batches = limit
