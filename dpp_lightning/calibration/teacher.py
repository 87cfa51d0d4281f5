"""The fine-tuned model's outputs on pieces of calibration data, kept so that two models are never in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpp_lightning.calibration.output_change import largest, logits_that_count
from dpp_lightning.calibration.padding import Padding
from dpp_lightning.tensors.blocks import block_of
from dpp_lightning.tensors.names import canonical_names

TOP_LOGITS = 32  # of a token that are kept of the fine-tuned model's logits over a vocabulary
_LEAST = 1e-12  # of a normaliser: a part of the model in which nothing was trained

Forward = Callable[[Any], Tensor | Sequence[Tensor]]


class CannotTrain(ValueError):
    """A model of which gradients cannot be taken in the way that is asked for."""


@dataclass(frozen=True)
class Outputs:
    """What a model says on one piece: outputs and hidden states without padding.

    Attributes:
        outputs: as the forward gives them, each (..., classes).
        states: number of a block to what is after it, (tokens, hidden), in the order in which the blocks ran.
    """

    outputs: list[Tensor]
    states: dict[int, Tensor]


@dataclass(frozen=True)
class _Reference:
    """The fine-tuned model's outputs on one piece, of logits over a vocabulary the largest with their places."""

    outputs: list[tuple[Tensor, Tensor | None]]
    states: dict[int, Tensor]


@dataclass
class Teacher:
    """The fine-tuned model on pieces of calibration data.

    Its error of another model is, for outputs and for hidden states, the squared difference over that of the base: 1
    each at the base, 0 at the fine-tuned model.

    Args:
        module: holds the fine-tuned weights when :meth:`learn` is called, and the base's at :meth:`normalise`.
        forward: a piece to the outputs that are compared, without padding, each of shape (..., classes).
        patterns: where the blocks are, as for :func:`dpp_lightning.tensors.blocks.block_of`; none for known names.

    Attributes:
        blocks: the modules whose outputs are hidden states; none where they are not found.
    """

    module: nn.Module
    forward: Forward
    patterns: Sequence[str] = ()
    blocks: list[nn.Module] = field(default_factory=list)
    _references: list[_Reference] = field(default_factory=list)
    _of_outputs: float = 1.0
    _of_states: dict[int, float] = field(default_factory=dict)
    _repeated: bool = False

    def learn(self, pieces: Sequence[Any]) -> None:
        """Take the outputs of all pieces; the module holds the fine-tuned weights.

        Warns:
            UserWarning: the model's blocks are not found, so that only its outputs are compared.
        """
        self.blocks = blocks_in(self.module, self.patterns)
        with torch.no_grad():
            self._references = [self._referred(self.run(piece)) for piece in pieces]
        if not any(reference.states for reference in self._references):
            warnings.warn(
                f"no hidden states of {type(self.module).__name__} are found (its blocks go by no known names), so "
                "training compares outputs alone, which is worse on other texts",
                stacklevel=2,
            )

    @property
    def knows_blocks(self) -> bool:
        """Whether the module has blocks of which each runs once, as the last pass has shown."""
        return bool(self._references and self._references[0].states) and not self._repeated

    def check_blocks(self) -> None:
        """Refuse to train block by block where that cannot be.

        Raises:
            CannotTrain: a model whose blocks are not found, or of which one runs several times.
        """
        if not self.knows_blocks:
            why = "of which a block runs several times" if self._repeated else "whose blocks go by no known names"
            raise CannotTrain(f"loss=block is not for {type(self.module).__name__}, {why}: leave it out")

    def normalise(self, pieces: Sequence[Any], numbers: Sequence[int]) -> None:
        """Take the base's error as 1; the module holds the base's weights.

        Args:
            pieces: some of those that were learnt.
            numbers: which they are.
        """
        with torch.no_grad():
            parts = [self._errors(self.run(piece), number) for piece, number in zip(pieces, numbers, strict=True)]
        self._of_outputs = max(_LEAST, sum(float(outputs) for outputs, _ in parts) / len(parts))
        sums = {i: sum(float(states[i]) for _, states in parts) for i in parts[0][1]}
        self._of_states = {i: max(_LEAST, total / len(parts)) for i, total in sums.items()}

    def loss(self, piece: Any, number: int) -> Tensor:
        """The error of the module as it stands on one piece, a scalar through which gradients flow.

        Args:
            piece: of calibration data.
            number: which of those that were learnt it is.
        """
        return self._sum(*self._errors(self.run(piece), number))

    def backward_by_block(self, piece: Any, number: int, leaves: Sequence[Sequence[Tensor]]) -> Tensor:
        """Gradients of the error, every block's from the states after it alone.

        The pass backward through a block follows the one forward at once, so that no more than one block is held. What
        is in no block has gradients from the first block's states and from the outputs, not by way of other blocks.

        Args:
            piece, number: as in :meth:`loss`.
            leaves: what is trained in each of the blocks, and last what is trained outside of them.

        Returns:
            The error, as :meth:`loss` gives it.

        Raises:
            CannotTrain: a model whose blocks are not found, or of which one runs several times.
        """
        self.check_blocks()
        known, keep = self._references[number].states, _tokens_of(piece)
        first, errors = next(iter(known)), dict[int, Tensor]()

        def hook(index: int, output: Any) -> Any:
            state = _state_of(output)
            if state is None or index not in known:
                return None
            error = _squared_error(_without_padding(state, keep), known[index])
            of_block = [*leaves[index], *(leaves[-1] if index == first else ())]
            take_gradients(error / self._of_states[index] / len(known), of_block)
            errors[index] = error.detach()
            return _detached(output)

        others = [block for index, block in enumerate(self.blocks) if index != first]
        with _hooked(self.blocks, hook), _given_constants(others):
            found = self.run(piece)
        outputs, _ = self._errors(Outputs(found.outputs, {}), number)
        take_gradients(outputs / self._of_outputs, leaves[-1])
        return self._sum(outputs, errors).detach()

    def _sum(self, outputs: Tensor, states: Mapping[int, Tensor]) -> Tensor:
        loss = outputs / self._of_outputs
        if states:
            loss = loss + sum(error / self._of_states[i] for i, error in states.items()) / len(states)
        return loss

    def run(self, piece: Any) -> Outputs:
        """The module's outputs on a piece, without padding."""
        states: dict[int, Tensor] = {}

        def note(index: int, output: Any) -> None:
            state = _state_of(output)
            if state is not None:
                self._repeated |= states.pop(index, None) is not None  # the last run of a block counts
                states[index] = state

        with _hooked(self.blocks, note):
            outputs = self.forward(piece)
        keep = _tokens_of(piece)
        return Outputs(
            [outputs] if isinstance(outputs, Tensor) else list(outputs),
            {index: _without_padding(state, keep) for index, state in states.items()},
        )

    def _referred(self, found: Outputs) -> _Reference:
        outputs: list[tuple[Tensor, Tensor | None]] = []
        for output in found.outputs:
            places = largest(output, logits_that_count(self.module, output, TOP_LOGITS))
            taken = output if places is None else output.gather(-1, places)
            outputs.append((taken.float().cpu(), None if places is None else places.to(torch.int32).cpu()))
        return _Reference(outputs, {index: state.cpu() for index, state in found.states.items()})

    def _errors(self, found: Outputs, number: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Mean squared errors of outputs, and of the states after every block."""
        reference = self._references[number]
        errors = []
        for output, (values, places) in zip(found.outputs, reference.outputs, strict=True):
            taken = output if places is None else output.gather(-1, places.to(output.device, torch.int64))
            errors.append(_squared_error(taken, values))
        states = {index: _squared_error(state, reference.states[index]) for index, state in found.states.items()}
        return torch.stack(errors).mean(), states


def blocks_in(module: nn.Module, patterns: Sequence[str] = ()) -> list[nn.Module]:
    """The modules inside a model that are its numbered blocks, in the order of their names in it.

    Args:
        module: the model.
        patterns: where the blocks are, by canonical names; none for the names that are known.
    """
    if not patterns:
        return [child for name, child in module.named_modules() if name and block_of(f"{name}.") == f"{name}."]
    found: dict[str, None] = {}
    for name, canonical in canonical_names(module).items():
        block = block_of(canonical, patterns)
        if block is not None and name.endswith(inside := canonical.removeprefix(block)):
            found[name.removesuffix(inside).rstrip(".")] = None
    return [module.get_submodule(name) for name in found]


@contextmanager
def _hooked(blocks: Sequence[nn.Module], hook: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call a hook with the number and the output of every block that runs, before all other hooks of the block; what it
    returns, if not None, is taken in place of the output."""

    def of(index: int) -> Callable[..., Any]:
        return lambda _module, _inputs, output: hook(index, output)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(of(index), prepend=True).remove)
        yield


@contextmanager
def _given_constants(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let no gradient through to what these blocks are given: states, positions, an encoder's states."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return _detached(args), _detached(kwargs)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _detached(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def take_gradients(error: Tensor, leaves: Sequence[Tensor] | None = None) -> None:
    """The pass backward.

    Args:
        error: a scalar.
        leaves: what gradients are taken of; of all by default.

    Raises:
        CannotTrain: the model changes in place what its gradients need.
    """
    if leaves is not None and not (leaves and error.requires_grad):
        return
    try:
        error.backward(inputs=leaves)
    except RuntimeError as refusal:
        if "inplace operation" not in str(refusal):
            raise
        raise CannotTrain(
            "the model cannot be trained, as it changes in place what its gradients need: take a method that does not "
            "train, such as 'importance'"
        ) from refusal


def _squared_error(found: Tensor, known: Tensor) -> Tensor:
    """The mean over all numbers."""
    return (found.float() - known.to(found.device).float()).square().mean()


def _state_of(output: Any) -> Tensor | None:
    """The hidden state, which a block returns first; None where that is something else."""
    first = output if isinstance(output, Tensor) else _first_tensor(output)
    return first if first is not None and first.is_floating_point() and first.dim() > 1 else None


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
