"""What training kept values or factors takes (``refit``, ``lowrank``), computed from a model's size.

Plain arithmetic, without torch. Full fine-tuning has a gradient and two moments of every parameter; these methods have
them of the trained numbers alone, and one model at a time, as the fine-tuned model's outputs are taken before the
base's weights are put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from types import MappingProxyType
from typing import Literal, NamedTuple

from dpp_lightning.analysis.memory_plan import BYTES, GIB, Dtype

TOP_LOGITS = 32  # of a token that are kept of the fine-tuned model's, a value and an index each
_STATE_BYTES = 4 * 4  # of a trained number: value, gradient and two moments, float32
_PLACE_BYTES = 3 * 8  # of a kept entry: its position, row and column
_INNER = 14  # tensors of one token that one block holds in its backward pass, in units of the hidden size


class DecoderShape(NamedTuple):
    """A decoder's size.

    Attributes:
        parameters: of the whole model.
        blocks: its layers.
        hidden: entries of a hidden state.
        outside: parameters in no block: embeddings and a head.
    """

    parameters: float
    blocks: int
    hidden: int
    outside: float = 0


DECODERS: Mapping[str, DecoderShape] = MappingProxyType(
    {
        "0.5 B": DecoderShape(0.5e9, 24, 896, 151_936 * 896),
        "7 B": DecoderShape(7e9, 32, 4096, 2 * 32_000 * 4096),
        "70 B": DecoderShape(70e9, 80, 8192, 2 * 32_000 * 8192),
    }
)


@dataclass(frozen=True)
class FitMemory:
    """Bytes, whole numbers >= 0.

    Attributes:
        weights: on the device: of the model, or of one block and of what is in no block.
        trained: values, gradients, both moments and positions of the trained numbers.
        activations: what one block holds inside, and end to end, with gradient checkpointing, the inputs of all blocks.
        teacher: outputs of the fine-tuned model, in the host's memory.
        streamed: weights in the host's memory, from where blocks go to the device as they run; the trained numbers are
            with them.
    """

    weights: int
    trained: int
    activations: int
    teacher: int
    streamed: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.activations + (0 if self.streamed else self.trained)

    @property
    def host(self) -> int:
        """Bytes in the host's memory."""
        return self.teacher + self.streamed + (self.trained if self.streamed else 0)


def plan_fit_memory(
    shape: DecoderShape,
    *,
    pruning_rate: float = 0.999,
    texts: int = 256,
    length: int = 128,
    step_texts: int = 8,
    weights: Dtype = "bfloat16",
    loss: Literal["model", "block"] = "model",
) -> FitMemory:
    """Plan the training of kept values by distillation, with gradients at the kept entries alone.

    Args:
        shape: of the model.
        pruning_rate: p in [0, 1), the fraction dropped; (1 - p) n numbers are trained.
        texts: of calibration.
        length: tokens of a text.
        step_texts: texts of a step.
        weights: dtype of weights, activations and of the fine-tuned model's hidden states.
        loss: ``model`` trains all blocks end to end against logits and hidden states; ``block`` each against the hidden
            states after it, with no more of the blocks on the device than the one that runs.

    Raises:
        ValueError: a number outside its range, or an unknown dtype or loss.
    """
    if not 0 <= pruning_rate < 1:
        raise ValueError(f"pruning_rate is the fraction dropped, in [0, 1); got {pruning_rate!r}")
    if weights not in BYTES or loss not in ("model", "block"):
        raise ValueError(f"weights must be one of {', '.join(BYTES)} and loss 'model' or 'block'")
    for name, count in (("texts", texts), ("length", length), ("step_texts", step_texts), ("blocks", shape.blocks)):
        if count < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, got {count!r}")
    size, by_block = BYTES[weights], loss == "block"
    in_blocks = shape.parameters - shape.outside
    held = shape.outside + in_blocks / shape.blocks if by_block else shape.parameters
    numbers = ceil((1 - Fraction(str(pruning_rate))) * ceil(shape.parameters))
    tokens, step_tokens = texts * length, step_texts * length
    return FitMemory(
        weights=ceil(held) * size,
        trained=numbers * (_STATE_BYTES + _PLACE_BYTES),
        activations=step_tokens * shape.hidden * size * ((1 if by_block else shape.blocks) + _INNER),
        teacher=tokens * (shape.hidden * size * shape.blocks + TOP_LOGITS * (size + 8)),
        streamed=ceil(in_blocks) * size if by_block else 0,
    )


def table(
    models: Mapping[str, DecoderShape] = DECODERS, *, pruning_rate: float = 0.999, texts: int = 256, length: int = 128
) -> str:
    """The plans as a Markdown table in GiB, beside full fine-tuning with Adam in the same dtype.

    Args:
        models: label to size.
        pruning_rate, texts, length: as in :func:`plan_fit_memory`.

    Raises:
        ValueError: as :func:`plan_fit_memory`.
    """
    lines = [
        "| model | full fine-tuning | end to end: device (weights, trained, activations) | host | block by block: "
        "device (weights, activations) | host (weights, trained, outputs of the fine-tuned model) |",
        "|---" * 6 + "|",
    ]
    for label, shape in models.items():
        whole, block = (
            plan_fit_memory(shape, pruning_rate=pruning_rate, texts=texts, length=length, loss=loss)
            for loss in ("model", "block")
        )
        full = ceil(shape.parameters) * (2 + 2 + 2 * 2) + whole.activations
        parts = ", ".join(_gib(size) for size in (whole.weights, whole.trained, whole.activations))
        there = ", ".join(_gib(size) for size in (block.weights, block.activations))
        here = ", ".join(_gib(size) for size in (block.streamed, block.trained, block.teacher))
        cells = [_gib(full), f"{_gib(whole.device)} ({parts})", _gib(whole.host), f"{_gib(block.device)} ({there})"]
        lines.append(f"| {label} | {' | '.join([*cells, f'{_gib(block.host)} ({here})'])} |")
    return "\n".join(lines)


def _gib(size: int) -> str:
    number = size / GIB
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"
