"""Whether a trainer and a module can do what the settings ask for, found out before training."""

from __future__ import annotations

import re

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dpp_lightning.callbacks.prune_run.best_weights import best_checkpoints, warn_of_several
from dpp_lightning.callbacks.prune_run.calibration_data import labelled_loader
from dpp_lightning.callbacks.prune_run.evaluation import check_callable
from dpp_lightning.callbacks.prune_run.hub_upload import check_can_upload
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.tensors.shards import is_dtensor
from dpp_lightning.trainer.strategies import refuse_flat_parameters, refuse_fsdp1, refuse_shared_memory

# words of a metric's name that tell its direction
_LOWER_IS_BETTER = {
    "loss", "losses", "error", "errors", "err", "perplexity", "ppl", "rmse", "mse", "mae", "mape", "nll", "wer", "cer",
    "brier", "entropy", "fid",
}  # fmt: skip
_HIGHER_IS_BETTER = {
    "acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "mcc", "matthews", "pearson", "spearman", "bleu",
    "rouge", "iou", "dice", "psnr", "ssim",
}  # fmt: skip


def check_shards(settings: PruneSettings, module: nn.Module) -> None:
    """Refuse methods that need whole parameters, if the module's are in shards.

    Raises:
        ValueError: if parameters are in shards and a method needs gradients.
    """
    needing = [*settings.methods_with_gradients, *settings.methods_that_train]
    if needing and any(is_dtensor(p) for p in module.parameters()):
        raise ValueError(
            f"{', '.join(needing)}: gradients of whole parameters are needed, but they are in shards: leave it out, "
            "and prune the saved model with dpp prune --calibration FILE"
        )


def check_trainer(settings: PruneSettings, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
    """Refuse a trainer or a module that cannot do what the settings ask for.

    Args:
        settings: of the callback.
        trainer, module: as in ``setup``.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        ValueError: if the strategy does not hold the parameters as they are, there is nothing to validate, no
            ModelCheckpoint for the best weights, no gradients or labels for a method that needs them, or no way to
            upload.
    """
    if getattr(trainer, "barebones", False):
        raise ValueError(
            "DeltaPruneCallback scores models by what the module logs, and Trainer(barebones=True) logs nothing: "
            "leave barebones out (--trainer.barebones false), or the callback"
        )
    warn_of_direction(settings)
    refuse_flat_parameters(trainer, "DeltaPruneCallback")
    refuse_fsdp1(trainer, "DeltaPruneCallback")
    refuse_shared_memory(trainer)
    if stage == "fit" and not trainer.enable_validation:
        raise ValueError(
            "DeltaPruneCallback scores every pruned model on the validation loop, but this trainer has none: give "
            "validation data and a validation_step, with limit_val_batches above 0"
        )
    if stage == "fit" and settings.ckpt == "best":
        best_checkpoints(trainer)
        warn_of_several(trainer)
    if settings.forward_fn is None and settings.needs_batch:
        check_callable(module)
    if settings.objective == "metric":
        labelled_loader(trainer, settings.calibration_dataloader)
    if settings.push_to_hub is not None and trainer.is_global_zero:  # the rank that uploads
        check_can_upload()


def warn_of_direction(settings: PruneSettings) -> None:
    """Warn if the name of the score says that it is better the other way round than ``mode`` does."""
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", settings.monitor).lower()))
    lower, higher = words & _LOWER_IS_BETTER, words & _HIGHER_IS_BETTER
    if bool(lower) == bool(higher) or words & {"neg", "negative"}:
        return
    other = "min" if lower else "max"
    if settings.mode != other:
        rank_zero_warn(
            f"mode={settings.mode!r} takes the {'highest' if lower else 'lowest'} {settings.monitor} for the best, "
            f"though {min(lower or higher)!r} is better when it is {'low' if lower else 'high'}: pass mode={other!r}"
        )
