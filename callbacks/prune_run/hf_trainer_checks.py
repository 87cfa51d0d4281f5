"""What a Hugging Face ``Trainer`` must be like for its deltas to be pruned; what is not is refused before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from dpp_lightning.callbacks.prune_run.base_weights import has_weights
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.storage.locate import local_path
from dpp_lightning.tensors.shards import is_dtensor

_LATER = "leave it out, save the model, and take `dpp prune BASE FINETUNED`"


def check_hf_trainer(trainer: Trainer, settings: PruneSettings, state: TrainerState) -> None:
    """Refuse a trainer that cannot do what the settings ask for.

    Args:
        trainer: at the beginning of a training, when its model is wrapped and placed.
        settings: of the callback.
        state: the one that the trainer passes to its callbacks.

    Raises:
        ValueError: the callback is attached to another trainer, weights are in shards or not there yet, a search of
            hyperparameters, or nothing to evaluate.
    """
    if trainer.state is not state:
        raise ValueError(
            f"{settings.callback} is attached to another Trainer than the one that trains: make one callback for each"
        )
    model: Any = trainer.model
    if hidden := _hidden_weights(trainer, model):
        raise ValueError(f"{settings.callback} needs whole weights in each process, but {hidden}: {_LATER}")
    if trainer.hp_search_backend is not None:
        raise ValueError(f"leave {settings.callback} out of hyperparameter_search; attach it for the final training")
    if not trainer.eval_dataset and type(trainer).get_eval_dataloader is Trainer.get_eval_dataloader:
        raise ValueError(f"{settings.callback} scores by Trainer.evaluate: give the Trainer an eval_dataset")
    if not has_weights(model):
        raise ValueError(f"{type(model).__name__} holds no weights yet, so there is no base to take")


def _hidden_weights(trainer: Trainer, model: nn.Module) -> str:
    """Why a process does not hold whole weights; empty if it does."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed hides them"
    if trainer.is_fsdp_enabled:
        return "FSDP shards them"
    if any(is_dtensor(p) for p in model.parameters()):
        return "a device mesh shards them"
    kind = str(getattr(trainer.accelerator.distributed_type, "value", trainer.accelerator.distributed_type))
    return "" if kind == "NO" or kind.startswith("MULTI_") else f"{kind} may not hold them so"


def pruning_callbacks(trainer: Trainer) -> list[PruneSettings]:
    """The settings of every callback of a trainer that prunes."""
    found = [getattr(callback, "settings", None) for callback in trainer.callback_handler.callbacks]
    return [settings for settings in found if isinstance(settings, PruneSettings)]


def hf_folder(settings: PruneSettings, trainer: Trainer) -> Path:
    """The output folder of a callback in a trainer."""
    return local_path(settings.output_dir or Path(str(trainer.args.output_dir)) / "deltas")


def go_last(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback behind those that may still change weights, and before those that close their logs at the end."""
    others: Sequence[TrainerCallback] = [c for c in trainer.callback_handler.callbacks if c is not callback]
    loggers = [c for c in others if type(c).__module__.startswith("transformers.integrations")]
    rest = [c for c in others if c not in loggers]
    trainer.callback_handler.callbacks = [*rest, callback, *loggers]  # a new list: the old one is being gone through
