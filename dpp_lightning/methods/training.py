"""The settings of training that methods have whose kept numbers are trained; their fits read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Activations = Literal["kept", "recomputed"]
Loss = Literal["auto", "model", "block"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and in how much memory the numbers of a delta are trained.

    Attributes:
        steps: of the optimizer, each on one batch of calibration data; 0 for the method's own.
        activations: ``recomputed`` has every block of a transformers model computed anew in the backward pass
            (gradient checkpointing), which takes a third more time and far less memory.
        loss: ``model`` trains end to end; with ``block`` every block of the model is trained on its own error alone,
            given what the blocks before it make, so that no more than one block is held for the backward pass. ``auto``
            is ``block`` for factors, which then do better on other texts, and ``model`` for kept values, with
            ``recomputed``, and where a model's blocks are not found or run several times.

    Raises:
        ValueError: a number of steps that is not whole or below 0, another word, or ``recomputed`` with ``block``.
    """

    steps: int = 0
    activations: Activations = "kept"
    loss: Loss = "auto"

    def __post_init__(self) -> None:
        if self.steps != int(self.steps) or self.steps < 0:
            raise ValueError(
                f"steps must be a whole number of training steps, or 0 for the method's own; got {self.steps!r}"
            )
        if self.activations not in get_args(Activations):
            raise ValueError(f"activations must be 'kept' or 'recomputed', got {self.activations!r}")
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss must be 'auto', 'model' or 'block', got {self.loss!r}")
        if self.loss == "block" and self.activations == "recomputed":
            raise ValueError("loss=block holds one block's activations already: leave activations=recomputed out")

    @classmethod
    def among(cls, settings: Mapping[str, Any]) -> set[str]:
        """Names of those among a method's settings."""
        return settings.keys() & {field.name for field in fields(cls)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Training:
        """Those among a method's settings."""
        return cls(**{name: settings[name] for name in cls.among(settings)})


def verify(settings: Mapping[str, Any]) -> None:
    """Refuse settings of training that are out of their range.

    Raises:
        ValueError: as :class:`Training`.
    """
    Training.of(settings)
