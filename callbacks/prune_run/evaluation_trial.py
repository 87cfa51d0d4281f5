"""Whether a module evaluates the weights that it holds, tried before training, which goes on as if it were not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchmetrics import Metric

from dpp_lightning.calibration.evaluation_mode import buffers_kept
from dpp_lightning.storage.locate import few_names
from dpp_lightning.tensors.shards import is_dtensor

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def training_as_it_was(trainer: pl.Trainer) -> Iterator[None]:
    """Undo what the module's own steps and hooks do in a pass that is no part of its training.

    Put back are the settings of optimizers and schedules, the module's buffers, its numbers and words, such as a best
    score or how long it has not risen, the states of its metrics, what it had not made yet (None), and whether training
    is to stop.
    """
    module: Any = trainer.lightning_module
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    states = [dict(scheduler.state_dict()) for scheduler in schedulers]
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    put_buffers_back = buffers_kept(module)
    metrics = [(part, _state_of(part)) for part in module.modules() if isinstance(part, Metric)]
    should_stop = trainer.should_stop
    try:
        yield
    finally:
        for group, before in zip(groups, settings, strict=True):
            group.update(before)
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for made in (module._modules, module._parameters, module._buffers):
            for name in attributes.keys() & made.keys():
                del made[name]
        vars(module).update(attributes)
        for metric, values in metrics:
            vars(metric).update(values)
        put_buffers_back()
        trainer.should_stop = should_stop


def _state_of(metric: Metric) -> dict[str, Any]:
    """What a metric has counted and computed, copied, since it counts in place."""
    kept: dict[str, Any] = {}
    for name, value in vars(metric).items():
        if isinstance(value, Tensor):
            kept[name] = value.detach().clone()
        elif isinstance(value, list):
            kept[name] = [*value]
        elif isinstance(value, _PLAIN):
            kept[name] = value
    return kept


def check_optimizers(trainer: pl.Trainer) -> None:
    """Refuse optimizers that hold other weights for evaluation than for training.

    Raises:
        ValueError: one has ``train()`` and ``eval()``, as those of schedulefree do.
    """
    for optimizer in trainer.optimizers:
        if all(callable(getattr(optimizer, name, None)) for name in ("train", "eval")):
            raise ValueError(
                f"{type(optimizer).__name__} holds other weights for evaluation than for training, and pruned models "
                "would be scored by neither: train without DeltaPruneCallback, save the weights after its eval(), and "
                "prune them with dpp prune or Trainer.validate"
            )


def check_evaluated_weights(module: nn.Module, evaluate: Callable[[], object]) -> None:
    """Refuse a module whose evaluation puts other weights, such as their average, in the place of its own.

    An entry of every parameter is changed for one pass, and otherwise for a second: where a submodule finds the same
    value both times, it is not that of the module. Compiled modules and parameters in shards are passed over.

    Args:
        module: that is trained.
        evaluate: a pass over some validation data. What goes wrong in it is not looked at here.

    Raises:
        ValueError: with the names of such parameters.
    """
    if any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in module.modules()):
        return
    marks = {id(p): _Mark(name, p) for name, p in module.named_parameters() if _can_be_marked(p)}
    if not marks:
        return
    first, second = (_seen(marks, evaluate, change) for change in (1 / 16, 1 / 8))
    replaced = [marks[key].name for key in first.keys() & second.keys() if torch.equal(first[key], second[key])]
    if replaced:
        raise ValueError(
            f"the evaluation puts other weights in the place of {few_names(sorted(replaced))} of "
            f"{type(module).__name__}, such as an average that is kept beside them, so that it would not score pruned "
            "models: average by a callback, such as Lightning's WeightAveraging, or prune the averaged weights with "
            "dpp prune"
        )


def _seen(marks: Mapping[int, _Mark], evaluate: Callable[[], object], change: float) -> dict[int, Tensor]:
    """The first entry of every marked parameter as its submodule meets it first in an evaluation of changed ones."""
    seen: dict[int, Tensor] = {}

    def look(owner: nn.Module, inputs: object) -> None:
        for key in map(id, owner._parameters.values()):
            if key in marks and key not in seen:
                seen[key] = marks[key].entry().clone()

    hook = register_module_forward_pre_hook(look)
    try:
        for mark in marks.values():
            mark.put(change)
        evaluate()
    except Exception:  # a step that fails is reported by the trials of the score and of the calibration data
        pass
    finally:
        hook.remove()
        for mark in marks.values():
            mark.remove()
    return seen


class _Mark:
    """The first entry of a parameter, which is changed and put back."""

    def __init__(self, name: str, parameter: Tensor) -> None:
        self.name, self._parameter = name, parameter
        self._before = self.entry().clone()

    def entry(self) -> Tensor:
        return self._parameter.detach()[(0,) * self._parameter.dim()]

    def put(self, change: float) -> None:
        self.entry().add_((self._before.abs() + 1) * change)

    def remove(self) -> None:
        self.entry().copy_(self._before)


def _can_be_marked(parameter: Tensor) -> bool:
    wide = parameter.is_floating_point() and parameter.element_size() > 1
    return wide and parameter.numel() > 0 and not is_dtensor(parameter) and not parameter.is_inference()
