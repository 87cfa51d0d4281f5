"""Parameter groups, a separate one for new heads, and the learning-rate schedule of the papers."""

import math
from collections.abc import Collection
from typing import Any, Literal, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from dpp_lightning.optim import AdamR
from dpp_lightning.tensors.names import without_wrappers
from dpp_lightning.trainer.strategies import refuse_flat_parameters, refuse_shared_memory

Schedule = Literal["linear", "constant"] | LRSchedulerCallable


def parameter_groups(module: nn.Module, new_parameter_names: Collection[str]) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that come from the base and those of a new head.

    A newly initialised parameter has no pre-trained value to decay toward, so its group has ``new=True``: ``AdamR``
    gives it no delta decay, and torch's own optimizers ignore the key.

    Args:
        module: any module; its parameters with ``requires_grad=True`` are trained.
        new_parameter_names: names, as in ``module.named_parameters()``, of the newly initialised parameters, without
            the prefixes that ``torch.compile`` and FSDP put into names.

    Returns:
        At most two groups, the pre-trained parameters first, each in the order of the module; an empty one is left out.

    Raises:
        ValueError: a name that is no parameter of the module, or no parameter to train.
    """
    named = {without_wrappers(name): parameter for name, parameter in module.named_parameters()}
    if unknown := sorted(set(new_parameter_names) - named.keys()):
        raise ValueError(
            f"new_parameter_names holds {unknown}, which {type(module).__name__} does not have; "
            f"give names as in named_parameters(), such as {next(iter(named), 'none: it has no parameters')!r}"
        )
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad=True; unfreeze what to train")
    new = set(new_parameter_names)
    old_parameters = [parameter for name, parameter in trained.items() if name not in new]
    new_parameters = [parameter for name, parameter in trained.items() if name in new]
    groups: list[dict[str, Any]] = []
    if old_parameters:
        groups.append({"params": old_parameters})
    if new_parameters:
        groups.append({"params": new_parameters, "new": True})
    return groups


def with_schedule(
    optimizer: Optimizer,
    scheduler: Schedule,
    interval: Literal["step", "epoch"],
    trainer: Trainer,
    warmup_fraction: float,
) -> OptimizerLRScheduler:
    """The optimizer and its schedule, as ``configure_optimizers`` returns them.

    Args:
        optimizer: the optimizer.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler. One that
            waits for a metric has its own ``monitor``, as ``lightning.pytorch.cli.ReduceLROnPlateau`` (by that name,
            as torch has another), else ``val_loss`` where its mode is ``min`` and ``val_score`` where it is ``max``.
        interval: how often a scheduler that the user names is stepped.
        trainer: gives the number of steps of the whole training.
        warmup_fraction: fraction of all steps, in [0, 1], that ``linear`` warms up in.

    Raises:
        ValueError: AdamR under DeepSpeed, or under FSDP1 with ``use_orig_params=False``; ranks that share the weights'
            memory.
    """
    refuse_shared_memory(trainer)
    if isinstance(optimizer, AdamR):
        refuse_flat_parameters(trainer, "AdamR")
    if scheduler == "constant":
        return optimizer
    if callable(scheduler):
        made = scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": made, "interval": interval, "monitor": _monitor_of(made)}
    else:
        steps = cast(int, trainer.estimated_stepping_batches)
        config = {"scheduler": linear_warmup_decay(optimizer, steps, warmup_fraction), "interval": "step"}
    return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": config})


def _monitor_of(scheduler: Any) -> str:
    """The metric that a scheduler waits for: one that it names, else the score if that is to rise, else the loss."""
    named: str | None = getattr(scheduler, "monitor", None)
    return named or ("val_score" if getattr(scheduler, "mode", "max") == "max" else "val_loss")


def linear_warmup_decay(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.06) -> LambdaLR:
    """Learning rate that rises linearly from 0 to its value, then falls linearly to 0; to be stepped every step.

    Args:
        optimizer: the ``lr`` of its groups is scaled.
        total_steps: number of optimizer steps of the whole training, at least 1.
        warmup_fraction: fraction of ``total_steps``, in [0, 1], in which it rises; the papers' encoders use 0.06.

    Raises:
        ValueError: a value outside its range.
    """
    if not (isinstance(total_steps, int) and total_steps >= 1):
        raise ValueError(
            f"total_steps is {total_steps}, expected a whole number of at least 1; "
            "set trainer.max_epochs or trainer.max_steps, or take scheduler: constant"
        )
    if not 0.0 <= warmup_fraction <= 1.0:
        raise ValueError(
            f"warmup_fraction is {warmup_fraction}, expected a fraction of the steps in [0, 1], such as 0.06"
        )
    return get_linear_schedule_with_warmup(optimizer, math.ceil(total_steps * warmup_fraction), total_steps)
