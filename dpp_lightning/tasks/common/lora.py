"""LoRA adapters, by peft, in a model: the base is frozen, adapters and new submodules are trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpp_lightning.tensors.names import without_adapters


@dataclass(frozen=True)
class LoRA:
    """Fine-tuning by W + (alpha / r) B A, with A and B trained and W frozen.

    Attributes:
        r: rank of the adapters, at least 1.
        alpha: scale of the adapters, above 0; B A is multiplied by alpha / r.
        dropout: dropout rate of the adapters' input in training, in [0, 1).
        target_modules: the layers that get an adapter, by the ends of their names, such as ``[query, value]``, or
            ``all-linear``; by default those that peft chooses for the architecture.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value outside its range.
        """
        if self.r < 1:
            raise ValueError(f"lora.r is {self.r}, expected a rank of at least 1, such as 8")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}, expected a scale above 0, such as 2 * r")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, expected a rate in [0, 1), such as 0.1")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                f"lora.target_modules is {self.target_modules!r}, expected a list of names such as [query, value], "
                "or 'all-linear'"
            )

    @classmethod
    def from_setting(cls, setting: LoRA | Mapping[str, Any] | None) -> LoRA | None:
        """The setting itself, or one made of the plain values that a checkpoint holds."""
        return cls(**setting) if isinstance(setting, Mapping) else setting

    def plain(self) -> dict[str, Any]:
        """The attributes as plain values, for a checkpoint."""
        return asdict(self)


def with_adapters(
    model: PreTrainedModel, lora: LoRA, new_names: Collection[str], layer: str, seed: int, task_type: str = "SEQ_CLS"
) -> tuple[nn.Module, set[str], str]:
    """Freeze a model and put adapters into it; its new submodules are trained whole, as peft's ``modules_to_save``.

    Args:
        model: a classifier or decoder, changed in place.
        lora: the setting.
        new_names: names, in the model, of the parameters that no file of the base holds.
        layer: name of a submodule of the model.
        seed: seed of the adapters' initial values; B is 0, so that the model's outputs do not change.
        task_type: peft's name of the task.

    Returns:
        The ``PeftModel``, and the names in it of the new parameters and of the layer.

    Raises:
        ValueError: target modules that the model does not have, or none that peft knows for its architecture.
    """
    from peft import LoraConfig, get_peft_model

    new_modules = sorted({_submodule(model, name) for name in new_names})
    _check_targets(model, lora, new_modules)
    config = LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=new_modules or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    wrapped = {f"base_model.model.{name}" for name in new_names}
    names = {name for name, _ in adapted.named_parameters() if without_adapters(name) in wrapped}
    used = (name for name, _ in adapted.named_modules() if "original_module" not in name)
    return adapted.train(), names, next(n for n in used if without_adapters(n) == f"base_model.model.{layer}")


def _submodule(model: PreTrainedModel, name: str) -> str:
    """The submodule that a new parameter belongs to, such as ``classifier`` or ``bert.pooler``."""
    depth = 2 if name.startswith(f"{model.base_model_prefix}.") else 1
    return ".".join(name.split(".")[:depth])


def _check_targets(model: PreTrainedModel, lora: LoRA, new_modules: list[str]) -> None:
    """Refuse names of layers that the model does not have, or has only in its new submodules.

    Raises:
        ValueError: these names, or an empty list; the message has the names to choose from.
    """
    if not isinstance(lora.target_modules, list):
        return
    layers = (nn.Linear, nn.Embedding, Conv1D)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, layers) and not any(f"{name}.".startswith(f"{new}.") for new in new_modules)
    ]
    unknown = [t for t in lora.target_modules if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not lora.target_modules:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"lora.target_modules is {lora.target_modules}, but {type(model).__name__} has no such layer outside its "
            f"new submodules: {unknown or 'the list is empty'}; expected names among {known}, or 'all-linear'"
        )
