"""Passes of a Hugging Face ``Trainer`` over data with the weights as they stand, which leave no trace in it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.output_change import Reduce, recorded_outputs
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.callbacks.prune_run.first_rank import computed_on_first
from dpp_lightning.callbacks.prune_run.training import SharedDistillation, without_padding
from dpp_lightning.methods.input_statistics import InputStatistics

if TYPE_CHECKING:
    from transformers import Trainer

PREFIX = "eval_"  # of every metric of Trainer.evaluate
_IGNORED = -100  # label of a token that the loss leaves out, as padding is
_OF_SPEED = ("_runtime", "_per_second", "_time")  # ends of the names of those that are no score
HFForwardFn = Callable[[nn.Module, Any], Tensor]
T = TypeVar("T")


class HFPasses:
    """Passes of ``Trainer.evaluate`` and forwards of its model.

    No callback acts in them, so nothing is logged, saved or stopped; state, control, random generators and the modes of
    the modules are as before. In several processes all of them must make a pass together, on equal weights.

    Args:
        trainer: its model holds the weights.
        monitor: name of the metric that is the score, with or without ``eval_``.
        forward_fn: (model, batch on its device) to the logits; default calls the model with the batch's items.
        output_layer: name of the submodule whose output is compared; default the model's logits.
    """

    def __init__(
        self, trainer: Trainer, monitor: str, forward_fn: HFForwardFn | None, output_layer: str | None
    ) -> None:
        self.trainer, self.forward_fn, self.output_layer = trainer, forward_fn, output_layer
        self.monitor = monitor if monitor.startswith(PREFIX) else PREFIX + monitor
        self.split = "eval_dataset"

    @property
    def module(self) -> nn.Module:
        """The trainer's model."""
        model: Any = self.trainer.model
        return cast(nn.Module, model)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.trainer.is_world_process_zero())

    def from_first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, on all of them, or the error that it raises; all must call."""
        return computed_on_first(compute, partial(from_first, self.trainer), is_first=self.is_first)

    def score(self, dataset: Any = None) -> float:
        """The monitored metric of ``Trainer.evaluate``; of several evaluation sets only the monitored one is gone over.

        Args:
            dataset: evaluated in place of the trainer's ``eval_dataset``.

        Returns:
            The first process's value on all of them, so that what follows from it does not part.

        Raises:
            ValueError: if the metric is not among those returned.
        """
        data, name = self._scored()
        if dataset is not None:
            data = dataset
        if name is not None:
            data = {name: data}
        own = dataset is None and name is None
        with undisturbed(self.trainer, other_data=not own):
            metrics = self.trainer.evaluate() if own else self.trainer.evaluate(eval_dataset=data)
        if self.monitor not in metrics:
            scores = sorted(key for key in metrics if key.startswith(PREFIX) and not key.endswith(_OF_SPEED))
            found = f": {', '.join(scores)}" if scores else ", which are none"
            has_metrics = self.trainer.compute_metrics is not None
            cure = "return it from compute_metrics" if has_metrics else "give the Trainer compute_metrics"
            also = ", or set monitor= to one of these" if scores else ""
            raise ValueError(
                f"monitor={self.monitor!r} is not among the metrics of Trainer.evaluate{found}; {cure}{also}"
            )
        return float(from_first(self.trainer, metrics[self.monitor]))

    def score_first(self) -> float:
        """The score of the first items of the evaluation data, of all where these cannot be taken.

        Raises:
            ValueError: if the metric is not among those returned.
        """
        data, _ = self._scored()
        return self.score(_first_items(data, self.trainer.args.eval_batch_size))

    def check_monitor(self) -> None:
        """Evaluate one batch of data to see that the metric is there; all of the data where one batch does not do.

        Raises:
            ValueError: if it is not.
        """
        try:
            self.score_first()
        except ValueError as error:
            if str(error).startswith("monitor="):
                raise
            self.score()
        except Exception:  # compute_metrics is the user's: it may need more than one batch, and fail in any way
            self.score()

    def outputs(self, batch: Any, reduce: Reduce) -> list[Tensor]:
        """What the model gives on a batch: its logits, without padding, or what the output layer returns.

        Args:
            batch: of the trainer's collator.
            reduce: called with the index of each output and the output; its result is what is returned.

        Raises:
            ValueError: if there are none.
        """
        with undisturbed(self.trainer), torch.no_grad():
            self.module.eval()
            if self.output_layer is None:
                found = self._logits(batch)
            else:
                with recorded_outputs(self.module, self.output_layer) as found:
                    self._forward(batch)
            if not found:
                raise ValueError(f"the output layer {self.output_layer!r} was not called; set output_layer=")
            mask = self._token_mask(batch)
            return [reduce(i, without_padding(t.detach().clone(), mask)) for i, t in enumerate(found)]

    def layer_inputs(self, batches: Sequence[Any], *, products: bool = False) -> dict[str, InputStatistics]:
        """Statistics of the input of every weight on some batches, by canonical name, with products of features where
        they are asked for."""
        collected = collected_inputs(self.module, products=products)
        with undisturbed(self.trainer), torch.no_grad(), collected as collector:
            self.module.eval()
            for batch in batches:
                self._forward(batch)
        return collector.statistics

    def output_gradients(self, batch: Any) -> BatchGradients:
        """Gradients of the logits' error on one batch.

        Raises:
            ValueError: if the model gives several sets of logits or none, or the batch is too small.
        """

        def forward(piece: Any) -> Tensor:
            logits = self._logits(piece)
            if len(logits) != 1:
                raise ValueError("darex-learned needs one tensor of logits: pass forward_fn=(model, batch) -> logits")
            return logits[0]

        return BatchGradients(self.module, self.trainer._prepare_inputs(batch), forward)

    def distillation(self, batch: Any, blocks: Sequence[str] = ()) -> SharedDistillation:
        """Training toward the logits of the weights as they stand, on pieces of one batch; the first process trains,
        and all have its numbers.

        Raises:
            ValueError: if the model gives no logits, or the batch cannot be cut.
        """

        def forward(piece: Any) -> list[Tensor]:
            mask = self._token_mask(piece)
            return [without_padding(logits, mask) for logits in self._logits(piece)]

        return SharedDistillation(self.module, self.trainer._prepare_inputs(batch), forward, self.from_first, blocks)

    def _scored(self) -> tuple[Any, str | None]:
        """The evaluation data that the monitor is of, and its name where there are several sets."""
        data = self.trainer.eval_dataset
        if not isinstance(data, dict):
            return data, None
        for name in sorted(data, key=len, reverse=True):
            if self.monitor.startswith(f"{PREFIX}{name}_"):
                return data[name], name
        raise ValueError(
            f"monitor={self.monitor!r} is of none of the evaluation sets {', '.join(data)}: set it to "
            f"{PREFIX}{next(iter(data))}_… or the like"
        )

    def _forward(self, batch: Any) -> Any:
        batch = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            if self.forward_fn is not None:
                return self.forward_fn(self.module, batch)
            if not isinstance(batch, Mapping):
                return self.module(batch)
            labels = self._labels_to_leave_out(batch)
            return self.module(**{key: value for key, value in batch.items() if key not in labels})

    def _labels_to_leave_out(self, batch: Mapping[str, Any]) -> set[str]:
        """Names of labels that no logits come from; the loss may refuse those of unlabelled data."""
        if self._makes_decoder_inputs and "decoder_input_ids" not in batch:
            return set()
        parameters = inspect.signature(self.module.forward).parameters
        needed = {name for name, p in parameters.items() if p.default is p.empty}
        return set(self.trainer.label_names) - needed

    @property
    def _makes_decoder_inputs(self) -> bool:
        """Whether the model has an encoder and a decoder, so that labels become the decoder's input."""
        return bool(getattr(getattr(self.module, "config", None), "is_encoder_decoder", False))

    def _token_mask(self, batch: Any) -> Tensor | None:
        """(samples, tokens), true where the output's token is no padding; None where that is not known."""
        if not isinstance(batch, Mapping):
            return None
        if not self._makes_decoder_inputs:
            return batch.get("attention_mask")
        labels = batch.get("labels")
        return labels != _IGNORED if isinstance(labels, Tensor) else batch.get("decoder_attention_mask")

    def _logits(self, batch: Any) -> list[Tensor]:
        output = self._forward(batch)
        if isinstance(output, Tensor):
            return [output]
        named = output if isinstance(output, Mapping) else {}
        logits = [value for key, value in named.items() if key.endswith("logits") and isinstance(value, Tensor)]
        if not logits:
            raise ValueError(
                f"{type(self.module).__name__} returned no logits ({type(output).__name__}); pass "
                "forward_fn=(model, batch) -> logits, or name a submodule with output_layer="
            )
        return logits


def from_first(trainer: Trainer, value: Any) -> Any:
    """The first process's value, on all of them; every process must call."""
    if trainer.args.world_size == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


@contextmanager
def undisturbed(trainer: Trainer, *, other_data: bool = False) -> Iterator[None]:
    """Inside the block no callback of a trainer acts; after it the trainer is as before, whatever was evaluated.

    Args:
        trainer: before, in or after training.
        other_data: a data set that is not the trainer's own is evaluated: loaders with persistent workers, which the
            trainer keeps and would take for it, are left aside.
    """
    handler, args, logger = trainer.callback_handler, trainer.args, logging.getLogger("transformers.trainer")
    level = logger.level
    before = handler.callbacks, handler.eval_dataloader, trainer.state, trainer.control
    persistent = args.dataloader_persistent_workers
    model: Any = trainer.model
    modes = [(child, child.training) for child in model.modules()]
    handler.callbacks, trainer.state, trainer.control = [], deepcopy(trainer.state), copy(trainer.control)
    args.dataloader_persistent_workers = persistent and not other_data
    logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))  # it would announce every pass in four lines
    try:
        with isolate_rng():
            yield
    finally:
        handler.callbacks, handler.eval_dataloader, trainer.state, trainer.control = before
        args.dataloader_persistent_workers = persistent
        logger.setLevel(level)
        for child, training in modes:
            child.training = training


def calibration_batch(trainer: Trainer, dataset: Any, samples: int) -> tuple[Any, str]:
    """One batch, as the trainer's collator makes it, of items at equal distances, and the name of its data.

    In several processes all have the first one's.

    Args:
        trainer: collates, with the columns that its model takes.
        dataset: with a length and items by index; None takes the training data.
        samples: how many items; fewer if the data has fewer.

    Raises:
        ValueError: if the data has no length or no items.
    """
    data: Any = trainer.train_dataset if dataset is None else dataset
    name = "train_dataset" if dataset is None else "calibration_dataset"
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or not len(data):
        raise ValueError(
            f"methods that calibrate need a batch of data, but {name} has no items that can be taken by index: pass "
            "calibration_dataset= (a data set or a list of items)"
        )
    count = min(samples, len(data))
    with undisturbed(trainer, other_data=True):
        loader = trainer.get_eval_dataloader(data)
        step = len(data) // count
        batch = loader.collate_fn([loader.dataset[i * step] for i in range(count)])
    batch = from_first(trainer, dict(batch) if isinstance(batch, Mapping) else batch)
    return batch, f"{count} items of {name}"


def _first_items(data: Any, count: int) -> Any:
    """The first items of a data set; None where it has none by index."""
    if hasattr(data, "select"):  # of datasets: stays one, so that columns which the model does not take are left out
        return data.select(range(min(count, len(data))))
    if isinstance(data, Dataset | list) and hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return Subset(data, range(min(count, len(data))))  # type: ignore[arg-type]
    return None
