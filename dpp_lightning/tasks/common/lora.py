"""LoRA adapters (by peft) around a model: the base stays as it is, adapters and the new parts are trained."""

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
        alpha: their scale, above 0; B A is multiplied by alpha / r.
        dropout: of the adapters' input in training, in [0, 1).
        target_modules: last parts of the names of the layers that get an adapter, such as ``[query, value]``, or
            ``all-linear``; by default the ones that peft has for the architecture.
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
            raise ValueError(f"lora.dropout is {self.dropout}, expected a share in [0, 1), such as 0.1")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                f"lora.target_modules is {self.target_modules!r}, expected a list of names such as [query, value], "
                "or 'all-linear'"
            )

    @classmethod
    def of(cls, setting: LoRA | Mapping[str, Any] | None) -> LoRA | None:
        """The setting itself, or made of plain values as a checkpoint holds them."""
        return cls(**setting) if isinstance(setting, Mapping) else setting

    def plain(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def with_adapters(
    model: PreTrainedModel, lora: LoRA, new: Collection[str], layer: str, seed: int, kind: str = "SEQ_CLS"
) -> tuple[nn.Module, set[str], str]:
    """Freeze a model and put adapters into it; its new parts are trained whole, as peft's ``modules_to_save``.

    Args:
        model: a classifier or decoder, changed in place.
        lora: the setting.
        new: names, in the model, of the parameters that no file of the base holds.
        layer: name of a submodule of the model.
        seed: of the adapters' first values; B is 0, so the model's outputs do not change.
        kind: peft's name of the task.

    Returns:
        The ``PeftModel``, and the names in it of the new parameters and of the layer.

    Raises:
        ValueError: target modules that the model has not, or none known for its architecture.
    """
    from peft import LoraConfig, get_peft_model

    parts = sorted({_part(model, name) for name in new})
    _check_targets(model, lora, parts)
    config = LoraConfig(
        task_type=kind,
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=parts or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    inside = {f"base_model.model.{name}" for name in new}
    names = {name for name, _ in adapted.named_parameters() if without_adapters(name) in inside}
    used = (name for name, _ in adapted.named_modules() if "original_module" not in name)
    return adapted.train(), names, next(n for n in used if without_adapters(n) == f"base_model.model.{layer}")


def _part(model: PreTrainedModel, name: str) -> str:
    """The part of the model that a parameter belongs to: ``classifier``, ``bert.pooler``."""
    depth = 2 if name.startswith(f"{model.base_model_prefix}.") else 1
    return ".".join(name.split(".")[:depth])


def _check_targets(model: PreTrainedModel, lora: LoRA, new: list[str]) -> None:
    if not isinstance(lora.target_modules, list):
        return
    layers = (nn.Linear, nn.Embedding, Conv1D)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, layers) and not any(f"{name}.".startswith(f"{part}.") for part in new)
    ]
    unknown = [t for t in lora.target_modules if not any(f".{name}".endswith(f".{t}") for name in names)]
    if unknown or not lora.target_modules:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"lora.target_modules is {lora.target_modules}, but {type(model).__name__} has no such layer outside its "
            f"new parts: {unknown or 'the list is empty'}; expected names among {known}, or 'all-linear'"
        )
