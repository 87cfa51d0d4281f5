"""Gradients of the training loss on a few batches before the first step, with nothing of the training changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from dpp_lightning.calibration.pieces import pieces_of
from dpp_lightning.callbacks.prune_run.calibration_batch import batch_of_items
from dpp_lightning.callbacks.prune_run.evaluation_trial import training_as_it_was

_WITHOUT_DATA = "take mask='random' or mask='magnitude', which need no data"


def mean_gradients(
    trainer: pl.Trainer, parameters: Sequence[Tensor], batches: int, *, squared: bool
) -> dict[int, Tensor]:
    """The mean over training batches of the gradient of the loss, or of its square, entry by entry.

    The loss is what ``training_step`` returns in evaluation mode (no dropout, no update of running statistics); what
    it logs is dropped and the metrics that it fills are reset. The items lie at equal distances in the training data
    and are the same on all ranks. Loaders and random states stay as they are.

    Args:
        trainer: in ``on_train_start``.
        parameters: of the module, all of which require a gradient.
        batches: how many batches of the training loader's size are taken, 1 or more; fewer where the data has fewer.
        squared: average the squares.

    Returns:
        Identity of each parameter to a float32 tensor of its shape, on its device.

    Raises:
        ValueError: the training data is a stream, the step returns no loss, or a gradient is not finite.
    """
    taken = _training_batches(trainer, batches)
    sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    with training_as_it_was(trainer), _apart_from_training(trainer.lightning_module):
        for index, batch in enumerate(taken):
            gradients = torch.autograd.grad(_loss(trainer, batch, index), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    wide = gradient.to_dense().float()
                    sums[id(parameter)] += wide.square() if squared else wide
    if not all(bool(total.isfinite().all()) for total in sums.values()):
        raise ValueError(
            f"the gradients on {len(taken)} training batches are not finite: check the loss, or {_WITHOUT_DATA}"
        )
    return {key: total / len(taken) for key, total in sums.items()}


def _training_batches(trainer: pl.Trainer, count: int) -> list[Any]:
    """Batches of the training loader's size, of items that lie at equal distances in its data."""
    loaders = trainer.fit_loop._combined_loader
    assert loaders is not None
    size = next((s for loader in loaders.flattened if (s := getattr(loader, "batch_size", None))), None)
    taken = None if size is None else batch_of_items(loaders, count * size, "train", spread=True)
    if size is None or taken is None:
        raise ValueError(
            "gradients on training batches need a DataLoader with a batch_size over a dataset of known items, and the "
            f"training data is a stream, or drawn or collated in another way: {_WITHOUT_DATA}"
        )
    return pieces_of(taken.batch, size)


def _loss(trainer: pl.Trainer, batch: Any, index: int) -> Tensor:
    """The loss of the module's training step."""
    module, strategy, plugin = trainer.lightning_module, trainer.strategy, trainer.precision_plugin
    given = strategy.batch_to_device(plugin.convert_input(batch))
    with plugin.train_step_context():
        indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        output = module.training_step(given, index) if indexed else module.training_step(given)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            f"{type(module).__name__}.training_step gave no loss with a gradient in evaluation mode: {_WITHOUT_DATA}"
        )
    return loss


@contextmanager
def _apart_from_training(module: pl.LightningModule) -> Iterator[None]:
    """Evaluation mode and no logging; modes, random states, metrics and parameters, which a training step may change as
    it does those of an average, are as before afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    counts = {child: child.update_count for child in module.modules() if isinstance(child, Metric)}
    held = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    module.eval()
    module.__dict__["log"] = lambda *_, **__: None  # log_dict calls it as well
    try:
        with isolate_rng():
            yield
    finally:
        del module.__dict__["log"]
        for child, training in modes:
            child.training = training
        with torch.no_grad():
            for parameter, before in held:
                if not torch.equal(parameter, before):
                    parameter.copy_(before)
        for metric, count in counts.items():
            if metric.update_count != count:
                metric.reset()
