"""The callback's settings, checked before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from dpp_lightning.calibration.output_change import MEASURES
from dpp_lightning.callbacks.prune_run.calibration_data import labelled_loader
from dpp_lightning.callbacks.prune_run.evaluation import check_callable
from dpp_lightning.methods.registry import METHODS, get_method
from dpp_lightning.sampling.sampler import exact_rate, stream_key
from dpp_lightning.tensors.dtypes import DTYPES
from dpp_lightning.tensors.names import without_adapters
from dpp_lightning.tensors.shards import is_dtensor
from dpp_lightning.trainer.strategies import refuse_flat, refuse_fsdp1, refuse_one_memory

if TYPE_CHECKING:
    from dpp_lightning.callbacks.delta_prune import DeltaPruneCallback

LAST_HIDDEN = "last_hidden"


def listed(value: Any) -> Sequence[Any]:
    """A setting that may be one value or several, as several."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def check_settings(settings: DeltaPruneCallback) -> None:
    """Report everything that is wrong with the settings in one error.

    Raises:
        ValueError: a rate outside [0, 1), an unknown method or choice, an empty or repeating list, ``apply`` with many.
    """
    faults = [
        *_refused(get_method, settings.methods),
        *_refused(exact_rate, settings.rates),
        *_refused(lambda seed: stream_key("", seed), settings.seeds),
    ]
    for what, value, choices in (
        ("mode", settings.mode, ("max", "min")),
        ("objective", settings.objective, ("output_change", "metric")),
        ("output_measure", settings.output_measure, MEASURES),
        ("ckpt", settings.ckpt, ("last", "best")),
        ("dtype", settings.dtype, (None, *DTYPES)),
        ("lora", settings.lora, (None, "adapter", "merged")),
    ):
        if value not in choices:
            faults.append(f"{what} must be one of {', '.join(map(str, choices))}, got {value!r}")
    lists: tuple[tuple[str, Sequence[Any]], ...] = (
        ("method", settings.methods),
        ("pruning_rate", settings.rates),
        ("seeds", settings.seeds),
    )
    for what, values in lists:
        if not values or len(set(values)) != len(values):
            faults.append(f"{what} must name at least one value and none twice, got {list(values)}")
    faults += [*_method_faults(settings), *_plot_faults(settings)]
    if settings.calibration_samples < 1:
        faults.append(f"calibration_samples must be at least 1, got {settings.calibration_samples}")
    if settings.apply and settings.resume:
        faults.append("apply=True leaves the pruned model in place, which resume=True would not make again: take one")
    if settings.apply and len(settings.methods) * len(settings.rates) * len(settings.seeds) != 1:
        faults.append("apply=True leaves one pruned model in place: give a single method, pruning_rate and seed")
    if faults:
        raise ValueError("DeltaPruneCallback: " + "; ".join(faults))


def check_shared(settings: DeltaPruneCallback, module: nn.Module) -> None:
    """Refuse what needs whole parameters, where the module's are in shards.

    Raises:
        ValueError: as said.
    """
    if not any(is_dtensor(p) for p in module.parameters()):
        return
    for name in settings.methods:
        if (fit := get_method(name).fit) is not None and fit.needs_gradients:
            raise ValueError(f"{name} needs gradients of whole parameters, but they are in shards: leave it out")


def check_trainer(settings: DeltaPruneCallback, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
    """Refuse a trainer or module that the job cannot be done in.

    Args:
        settings: the callback.
        trainer, module: as in ``setup``.
        stage: ``fit``, ``validate`` or ``test``.

    Raises:
        ValueError: a strategy without the parameters as they are, nothing to validate, no ModelCheckpoint for the best
            weights, no gradients or no labels where a method needs them.
    """
    refuse_flat(trainer, "DeltaPruneCallback")
    refuse_fsdp1(trainer, "DeltaPruneCallback")
    refuse_one_memory(trainer)
    if stage == "fit" and not trainer.enable_validation:
        raise ValueError(
            "DeltaPruneCallback scores every pruned model on the validation loop, but this trainer has none: give "
            "validation data and a validation_step, with limit_val_batches above 0"
        )
    if stage == "fit" and settings.ckpt == "best" and trainer.checkpoint_callback is None:
        raise ValueError("ckpt='best' needs a ModelCheckpoint(monitor=...) among the callbacks; found none")
    if settings.forward_fn is None and any(
        (fit := get_method(name).fit) is not None and fit.needs_gradients for name in settings.methods
    ):
        check_callable(module)
    if settings.objective == "metric":
        labelled_loader(trainer, settings.calibration_dataloader)


def output_layer(setting: str | None, module: nn.Module) -> str | None:
    """Name of the submodule whose output is compared; None for the last with parameters.

    Raises:
        ValueError: ``last_hidden``, of a module that does not tell which one that is.
    """
    if setting != LAST_HIDDEN:
        return setting
    if not isinstance(getattr(module, "output_layer", None), str):
        raise ValueError(
            f"output_layer='{LAST_HIDDEN}' needs a module with an attribute output_layer (a submodule's name), "
            f"which {type(module).__name__} has not; name the submodule itself"
        )
    told = str(module.output_layer)
    return told if told in dict(module.named_modules()) else without_adapters(told)


def _method_faults(settings: DeltaPruneCallback) -> list[str]:
    """Settings of methods that are not run or do not have them, and a dtype that a method's values would be lost in."""
    faults = []
    for name, own in settings.method_settings.items():
        if name not in settings.methods:
            faults.append(f"method_settings name {name!r}, which is not among the methods {list(settings.methods)}")
        elif name in METHODS:
            faults += _refused(partial(METHODS[name].check, 0), [own])
    for name in settings.methods if settings.dtype in DTYPES else ():
        if name in METHODS:
            faults += _refused(partial(METHODS[name].check_dtype, name), [settings.dtype])
    return faults


def _plot_faults(settings: DeltaPruneCallback) -> list[str]:
    """A curve over q of a method that is not run, or that has more than one q."""
    method = settings.plot
    if not isinstance(method, str):
        return []
    if method not in settings.methods:
        return [f"plot names {method!r}, which is not among the methods {settings.methods}"]
    if method in METHODS and (fit := METHODS[method].fit) is not None and not fit.one_q:
        return [f"plot={method!r}: that method has more than one q, so there is no curve over q"]
    return []


def _refused(check: Callable[[Any], Any], values: Sequence[Any]) -> list[str]:
    faults = []
    for value in values:
        try:
            check(value)
        except ValueError as error:
            faults.append(str(error))
    return faults
