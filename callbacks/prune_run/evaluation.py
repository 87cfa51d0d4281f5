"""Evaluating the weights as they stand with the module's own steps, hooks and metrics, inside a fit or after it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.output_change import Reduce, recorded_outputs, resolve_layer
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.callbacks.prune_run.calibration_batch import generators_kept
from dpp_lightning.callbacks.prune_run.evaluation_loop import OneBatch, run_evaluation_loop
from dpp_lightning.callbacks.prune_run.evaluation_trial import check_evaluated_weights, training_as_it_was
from dpp_lightning.callbacks.prune_run.first_rank import computed_on_first
from dpp_lightning.callbacks.prune_run.training import SharedDistillation, without_padding
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.tensors.shards import reshard

LOADER_SUFFIX = "/dataloader_idx_"  # follows a metric's name where there are several loaders
ForwardFn = Callable[[pl.LightningModule, Any], Tensor]
T = TypeVar("T")

_NO_LOGITS = (
    "methods that train need logits with gradients: give {} a forward(batch) that returns them (got {}), or pass "
    "DeltaPruneCallback(forward_fn=lambda module, batch: logits)"
)


class EvaluationPasses:
    """Extra passes of a trainer's validation loop, or of its test loop where the trainer is testing.

    Loggers are not written to, and no callback acts. Afterwards training mode, random state, limits and metrics are as
    before. All ranks must call.

    Args:
        trainer: inside a fit, a validate or a test.
        monitor: name of the logged metric that is the score; ``val_x``, ``val/x``, ``valid_x``, ``validation_x`` mean
            ``test_x``, ``test/x`` where the trainer is testing.
        trying: the passes are made before training, to see what they need; the module takes them for a sanity check.

    Attributes:
        monitor: from the first score on the metric's full name, which with several loaders tells the loader.
        num_loaders: of the split, once there is a score.
    """

    def __init__(self, trainer: pl.Trainer, monitor: str, *, trying: bool = False) -> None:
        self.trainer, self._asked, self._trying = trainer, monitor, trying
        self.testing = trainer.state.fn == TrainerFn.TESTING
        self.monitor = re.sub(r"^val(id(ation)?)?(?=[_/.-])", "test", monitor) if self.testing else monitor
        self.num_loaders = 1

    @property
    def split(self) -> str:
        """Name of the scored split: ``validation`` or ``test``."""
        return "test" if self.testing else "validation"

    def score(self, loader: Any = None) -> float:
        """The monitored metric of the weights as they stand, on the scored split or on another loader's data.

        Raises:
            ValueError: if the metric was not logged.
        """
        metrics = self._run_loop(loader)
        try:
            self.monitor = full_name(metrics, self.monitor)
        except ValueError:
            if self._asked not in metrics:
                raise
            self.monitor = self._asked  # a test step that logs as the validation step does
        # rank 0's value on all ranks, so that all of them come to the same decisions
        return float(self.trainer.strategy.broadcast(float(metrics[self.monitor])))

    def evaluate(self) -> None:
        """A pass over the scored split of which nothing is wanted."""
        self._run_loop(None)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first rank computes, on all of them, or the error that it raises; all ranks must call."""
        trainer = self.trainer
        return computed_on_first(compute, trainer.strategy.broadcast, is_first=trainer.is_global_zero)

    def pause(self, seconds: float) -> None:
        """Wait on all ranks, which must call, unless the first one got SIGTERM.

        Raises:
            SIGTERMException: it did.
        """

        def stopped() -> bool:
            time.sleep(seconds)
            return bool(self.trainer.received_sigterm)

        if self.from_first(stopped):
            raise SIGTERMException

    def layer_inputs(
        self, batches: Sequence[Any], forward_fn: ForwardFn | None = None, *, products: bool = False
    ) -> dict[str, InputStatistics]:
        """Statistics of the input of every weight on some batches, by canonical name, with products of features where
        they are asked for; weights that the evaluation step does not reach are left out."""
        with collected_inputs(self.trainer.lightning_module, products=products) as collector:
            for batch in batches:
                if forward_fn is not None:
                    self._forward_output(batch, forward_fn)
                else:
                    for _ in self._evaluation_steps(batch):
                        pass
        return collector.statistics

    def outputs(self, batch: Any, layer: str | None, forward_fn: ForwardFn | None, reduce: Reduce) -> list[Tensor]:
        """What the output layer returns on one batch, in the module's evaluation step or in ``forward_fn``.

        Args:
            batch: as the module's evaluation step takes it.
            layer: name of the submodule; None for the last one with parameters.
            forward_fn: called in place of the evaluation step.
            reduce: called with the index of each output and the output; its result is what is returned.

        Raises:
            ValueError: if the layer is not called.
        """
        if forward_fn is not None:
            return [reduce(0, self._forward_output(batch, forward_fn))]
        reduced: list[Tensor] = []
        with recorded_outputs(self.trainer.lightning_module, layer) as outputs:
            for mask in self._evaluation_steps(batch):
                while outputs:
                    output = outputs.pop(0)
                    # (samples, tokens, ...) becomes (tokens that are no padding, ...)
                    reduced.append(reduce(len(reduced), without_padding(output, mask)))
        if not reduced:
            name = resolve_layer(self.trainer.lightning_module, layer)
            raise ValueError(f"the output layer {name!r} was not called in the evaluation step; set output_layer=")
        return reduced

    def output_gradients(self, batch: Any, forward_fn: ForwardFn | None) -> BatchGradients:
        """Gradients of the output's error on one batch, which is cut into smaller batches.

        The output is that of ``forward_fn``, else of the module called with the batch, or with the first element of a
        batch that is a tuple or a list.

        Raises:
            ValueError: if the module cannot be called so, or the batch is too small.
        """
        trainer, module = self.trainer, self.trainer.lightning_module

        def forward(smaller_batch: Any) -> Tensor:
            with trainer.precision_plugin.forward_context(), isolate_rng():
                return forward_fn(module, smaller_batch) if forward_fn else _logits(module, smaller_batch)

        return BatchGradients(module, self._ready(batch), forward)

    def distillation(self, batch: Any, forward_fn: ForwardFn | None, blocks: Sequence[str] = ()) -> SharedDistillation:
        """Training toward the outputs of the weights as they stand, on pieces of one batch.

        The output is as for :meth:`output_gradients`. The first process trains, and all have its numbers.

        Args:
            batch, forward_fn: as for :meth:`output_gradients`.
            blocks: where the module's blocks are, if names do not tell.

        Raises:
            ValueError: if the module cannot be called so, or the batch cannot be cut.
        """
        trainer, module = self.trainer, self.trainer.lightning_module

        def forward(piece: Any) -> Tensor:
            with trainer.precision_plugin.forward_context(), isolate_rng():
                output = forward_fn(module, piece) if forward_fn else _logits(module, piece)
            return without_padding(output, piece.get("attention_mask") if isinstance(piece, Mapping) else None)

        return SharedDistillation(module, self._ready(batch), forward, self.from_first, blocks)

    def check_forward(self, batch: Any, forward_fn: ForwardFn | None) -> None:
        """Refuse a module whose evaluation step calls it with more than the first element of a batch.

        Raises:
            ValueError: the outputs differ.
        """
        module, seen = self.trainer.lightning_module, list[Tensor]()
        if forward_fn is not None:
            return

        def note(_module: Any, args: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
            if len(args) + len(named) > 1:
                seen.append(output)

        hook = module.register_forward_hook(note, with_kwargs=True)
        try:
            for _ in self._evaluation_steps(batch):
                pass
        finally:
            hook.remove()
        with self._evaluating(module):
            output = _logits(module, self._ready(batch))
        alike = [other for other in seen if isinstance(other, Tensor) and other.shape == output.shape]
        if alike and not any(torch.allclose(other, output, 1e-2, 1e-3, equal_nan=True) for other in alike):
            name = type(module).__name__
            raise ValueError(
                f"the evaluation step calls {name} with more than the first element of a batch, of which alone its "
                f"outputs are others, and methods that train would go by these: pass {name}'s call as "
                "DeltaPruneCallback(forward_fn=lambda module, batch: logits)"
            )

    def _evaluation_steps(self, batch: Any) -> Iterator[Tensor | None]:
        """Put one batch through the module's ``calibration_steps`` if it has them, else through its evaluation step.

        Yields:
            After each forward a mask of shape (samples, tokens), true where a token is no padding; None where all
            outputs count.
        """
        module = self.trainer.lightning_module
        steps = getattr(module, "calibration_steps", None)
        if steps is None:
            self._run_loop(OneBatch(batch))
            yield None
            return
        with self._evaluating(module):
            yield from steps(self._ready(batch))

    def _forward_output(self, batch: Any, forward_fn: ForwardFn) -> Tensor:
        """The output of ``forward_fn`` on one batch."""
        module = self.trainer.lightning_module
        with self._evaluating(module):
            return forward_fn(module, self._ready(batch)).detach().clone()

    def _ready(self, batch: Any) -> Any:
        """A batch as the trainer's loops hand it to the module: in the dtype of its precision, on its device."""
        return self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))

    @contextmanager
    def _evaluating(self, module: pl.LightningModule) -> Iterator[None]:
        training = module.training
        with isolate_rng(), training_as_it_was(self.trainer), torch.no_grad():
            module.eval()
            try:
                with self.trainer.precision_plugin.forward_context():
                    yield
            finally:
                module.train(training)
                reshard(module)

    def _run_loop(self, loader: Any) -> dict[str, Any]:
        """One pass of the loop; returns the metrics that were logged in it."""
        loop = self.trainer.test_loop if self.testing else self.trainer.validate_loop
        given = loop._data_source.instance  # a module makes loaders anew, as it does in training
        held = () if isinstance(given, pl.LightningModule | pl.LightningDataModule) else given
        with isolate_rng(), generators_kept(held), training_as_it_was(self.trainer):
            index = int(self.monitor.partition(LOADER_SUFFIX)[2] or 0)
            metrics, self.num_loaders = run_evaluation_loop(
                self.trainer, testing=self.testing, loader=loader, index=index, trying=self._trying
            )
        reshard(self.trainer.lightning_module)
        return metrics


def check_callable(module: pl.LightningModule) -> None:
    """Refuse a module that cannot be called, where gradients of its output are needed.

    Raises:
        ValueError: if it has no ``forward``.
    """
    if type(module).forward is pl.LightningModule.forward:
        raise ValueError(_NO_LOGITS.format(type(module).__name__, "no forward"))


def _logits(module: pl.LightningModule, batch: Any) -> Tensor:
    try:
        output = module(batch[0] if isinstance(batch, tuple | list) else batch)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(_NO_LOGITS.format(type(module).__name__, f"{type(error).__name__}: {error}")) from error
    if not isinstance(output, Tensor):
        raise ValueError(_NO_LOGITS.format(type(module).__name__, type(output).__name__))
    return output


def read_monitor(metrics: Mapping[str, Any], monitor: str) -> float:
    """The value of a metric; with several loaders, which give it a suffix each, the first loader's.

    Raises:
        ValueError: if it was not logged. The message lists what was.
    """
    return float(metrics[full_name(metrics, monitor)])


def full_name(metrics: Mapping[str, Any], monitor: str) -> str:
    """The name that a metric is logged by: ``monitor``, or with several loaders the same with the first one's suffix.

    Raises:
        ValueError: if it was not logged. The message lists what was.
    """
    for name in (monitor, f"{monitor}{LOADER_SUFFIX}0"):
        if name in metrics:
            return name
    raise ValueError(
        f"monitor={monitor!r} was not logged in the evaluation step; logged were {sorted(metrics) or 'no metrics'}. "
        "Log it with self.log in validation_step (on_epoch) or set monitor= to one of these. What another callback "
        "logs is no score: no callback acts when pruned models are scored"
    )


def warn_of_several_loaders(passes: EvaluationPasses, asked: str) -> None:
    """Warn if the score is one of several loaders' and the monitor does not tell which.

    Args:
        passes: have scored once.
        asked: the monitor as the user gave it.
    """
    if LOADER_SUFFIX in asked or LOADER_SUFFIX not in passes.monitor:
        return
    name = passes.monitor.split(LOADER_SUFFIX)[0]
    others = [f"{name}{LOADER_SUFFIX}{index}" for index in range(1, passes.num_loaders)]
    rank_zero_warn(
        f"monitor={asked!r} is logged for {passes.num_loaders} {passes.split} loaders: the score is {passes.monitor}, "
        f"that of the first; set monitor= to {' or '.join(others)} to score on another"
    )


def callbacks_act_in_validation(trainer: pl.Trainer) -> bool:
    """Whether a callback that is not Lightning's own has hooks in validation or test, in which it may log a metric."""
    ends = ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
    hooks = [f"on_{stage}_{end}" for stage in ("validation", "test") for end in ends]
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [c for c in callbacks if not type(c).__module__.startswith(("lightning.", "dpp_lightning."))]
    return any(is_overridden(hook, callback, parent=pl.Callback) for callback in others for hook in hooks)


def check_logged(trainer: pl.Trainer, monitor: str) -> None:
    """Evaluate one validation batch to see that the score is logged, and of which loader.

    Lightning's sanity check may be off, a resumed fit skips it, and in it other callbacks log as well.

    Raises:
        ValueError: if it is not logged.
    """
    for trying in (True, False):  # a sanity check keeps no metrics of several loaders, and some modules log none in it
        passes = EvaluationPasses(trainer, monitor, trying=trying)
        try:
            with _one_batch(trainer):
                passes.score()
            break
        except Exception:
            if not trying:
                raise
    warn_of_several_loaders(passes, monitor)


def check_evaluation(trainer: pl.Trainer, *, trying: bool) -> None:
    """Evaluate one validation batch to see that it is done with the weights that the module holds.

    Args:
        trainer: in a fit.
        trying: before training; an average that is kept beside the weights may be made only in it.

    Raises:
        ValueError: as :func:`dpp_lightning.callbacks.prune_run.evaluation_trial.check_evaluated_weights`.
    """
    passes = EvaluationPasses(trainer, "", trying=trying)
    with _one_batch(trainer):
        check_evaluated_weights(trainer.lightning_module, passes.evaluate)


@contextmanager
def _one_batch(trainer: pl.Trainer) -> Iterator[None]:
    limit = trainer.limit_val_batches
    trainer.limit_val_batches = 1
    try:
        yield
    finally:
        trainer.limit_val_batches = limit
