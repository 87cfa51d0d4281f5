"""The fine-tuned model's outputs on pieces of calibration data, kept so that two models are never in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.calibration.padding import Padding
from dpp_lightning.tensors.blocks import block_of

TOP_LOGITS = 32  # of a token, in descending order of the fine-tuned model's; those of fewer classes are all kept
_LEAST = 1e-12  # of a normaliser: a part of the model in which nothing was trained

Forward = Callable[[Any], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Outputs:
    """What a model says on one piece: outputs and hidden states without padding.

    Attributes:
        outputs: as the forward gives them, each (..., classes).
        states: after every block, each (tokens, hidden).
    """

    outputs: list[Tensor]
    states: list[Tensor]


@dataclass(frozen=True)
class _Reference:
    """The fine-tuned model's outputs on one piece, the largest of many classes with their places."""

    outputs: list[tuple[Tensor, Tensor | None]]
    states: list[Tensor]


@dataclass
class Teacher:
    """The fine-tuned model on pieces of calibration data.

    Its error of another model is, for outputs and for hidden states, the squared difference over that of the base: 1
    each at the base, 0 at the fine-tuned model.

    Args:
        module: holds the fine-tuned weights when :meth:`learn` is called, and the base's at :meth:`normalise`.
        forward: a piece to the outputs that are compared, without padding, each of shape (..., classes).

    Attributes:
        blocks: the modules whose outputs are hidden states; none where they are not found.
    """

    module: nn.Module
    forward: Forward
    blocks: list[nn.Module] = field(default_factory=list)
    _references: list[_Reference] = field(default_factory=list)
    _of_outputs: float = 1.0
    _of_states: list[float] = field(default_factory=list)

    def learn(self, pieces: Sequence[Any]) -> None:
        """Take the outputs of all pieces; the module holds the fine-tuned weights.

        Warns:
            UserWarning: the model's blocks are not found, so that only its outputs are compared.
        """
        self.blocks = blocks_in(self.module)
        with torch.no_grad():
            self._references = [self._referred(self.run(piece)) for piece in pieces]
        if not any(reference.states for reference in self._references):
            warnings.warn(
                f"no hidden states of {type(self.module).__name__} are found (its blocks go by no known names), so "
                "training compares outputs alone, which is worse on other texts",
                stacklevel=2,
            )

    def normalise(self, pieces: Sequence[Any], numbers: Sequence[int]) -> None:
        """Take the base's error as 1; the module holds the base's weights.

        Args:
            pieces: some of those that were learnt.
            numbers: which they are.
        """
        with torch.no_grad():
            parts = [self._errors(self.run(piece), number) for piece, number in zip(pieces, numbers, strict=True)]
        self._of_outputs = max(_LEAST, sum(float(outputs) for outputs, _ in parts) / len(parts))
        sums = [sum(float(states[i]) for _, states in parts) for i in range(len(parts[0][1]))]
        self._of_states = [max(_LEAST, total / len(parts)) for total in sums]

    def loss(self, piece: Any, number: int) -> Tensor:
        """The error of the module as it stands on one piece, a scalar through which gradients flow.

        Args:
            piece: of calibration data.
            number: which of those that were learnt it is.
        """
        outputs, states = self._errors(self.run(piece), number)
        loss = outputs / self._of_outputs
        if states:
            loss = loss + sum(e / n for e, n in zip(states, self._of_states, strict=True)) / len(states)
        return loss

    def run(self, piece: Any) -> Outputs:
        """The module's outputs on a piece, without padding."""
        with _states_of(self.blocks) as states:
            outputs = self.forward(piece)
        keep = _tokens_of(piece)
        return Outputs(
            [outputs] if isinstance(outputs, Tensor) else list(outputs),
            [_without_padding(state, keep) for state in states if state is not None],
        )

    def _referred(self, found: Outputs) -> _Reference:
        outputs: list[tuple[Tensor, Tensor | None]] = []
        for output in found.outputs:
            if output.dim() and output.shape[-1] > TOP_LOGITS:
                top = output.float().topk(TOP_LOGITS, dim=-1)
                outputs.append((top.values.cpu(), top.indices.to(torch.int32).cpu()))
            else:
                outputs.append((output.float().cpu(), None))
        return _Reference(outputs, [state.cpu() for state in found.states])

    def _errors(self, found: Outputs, number: int) -> tuple[Tensor, list[Tensor]]:
        """Mean squared errors of outputs, and of the states after every block."""
        reference = self._references[number]
        errors = []
        for output, (values, places) in zip(found.outputs, reference.outputs, strict=True):
            taken = output if places is None else output.gather(-1, places.to(output.device, torch.int64))
            errors.append((taken.float() - values.to(output.device)).square().mean())
        states = [
            (state.float() - known.to(state.device).float()).square().mean()
            for state, known in zip(found.states, reference.states, strict=True)
        ]
        return torch.stack(errors).mean(), states


def blocks_in(module: nn.Module) -> list[nn.Module]:
    """The modules inside a model that are its numbered blocks, in the order of their names in it."""
    return [child for name, child in module.named_modules() if name and block_of(f"{name}.") == f"{name}."]


@contextmanager
def _states_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """What every block returns first, in the forward pass inside the block; None of one that did not run."""
    states: list[Tensor | None] = [None] * len(blocks)

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else _first_tensor(output)
            if first is not None and first.is_floating_point() and first.dim() > 1:
                states[index] = first

        return hook

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Tensor | None:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def _tokens_of(piece: Any) -> Padding | None:
    """Which tokens of a piece count, where it has a mask."""
    mask = piece.get("attention_mask") if isinstance(piece, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return None
    return Padding(mask != 0)


def _without_padding(state: Tensor, keep: Padding | None) -> Tensor:
    places = keep.of_input(state, tuple(state.shape[:2])) if keep is not None and state.dim() == 3 else None
    return state[places] if places is not None else state.reshape(-1, state.shape[-1])
