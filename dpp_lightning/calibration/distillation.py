"""Distillation: kept values or factors of a delta trained to give the fine-tuned model's outputs and hidden states."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpp_lightning.calibration.evaluation_mode import evaluating
from dpp_lightning.calibration.teacher import CannotTrain, Forward, Teacher, take_gradients
from dpp_lightning.calibration.trained_tensors import TrainedTensors
from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.training import Training
from dpp_lightning.tensors.interrupts import restored_after

IN_A_STEP = 8  # samples of a piece, on each of which one step is made
HELD_OUT = 8  # one piece in so many is held out
CHECK_EVERY = 25  # steps
WARM_UP, BETAS, EPSILON = 0.06, (0.9, 0.99), 1e-12
FEWEST = 128  # samples: with fewer the guard is noise
_BASE_PIECES = 16  # on which the base's error is taken

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How values or factors are trained.

    Attributes:
        steps: of Adam, each on one piece.
        learning_rate: of kept values; of factors it is in units of the root mean square of each factor's numbers.
        seed: of the order of pieces.
        dtype: that kept values are rounded to in the loop, straight through; None for none.
        factors_dtype: the same of factors.
        checkpointing: recompute every block in the backward pass, for less memory.
        by_block: every block has the gradient of its own error alone, which takes less memory too.
    """

    steps: int = 200
    learning_rate: float = 0.02
    seed: int = 0
    dtype: str | None = None
    factors_dtype: str | None = None
    checkpointing: bool = False
    by_block: bool = False

    @classmethod
    def of(
        cls,
        info: DeltaInfo,
        steps: int,
        learning_rate: float,
        *,
        dtype: str | None = None,
        factors_dtype: str | None = None,
        by_block: bool = False,
    ) -> TrainingSettings:
        """The method's own, unless the delta's settings say otherwise (:mod:`dpp_lightning.methods.training`).

        Args:
            info: of the delta that is trained.
            steps, learning_rate: the method's own.
            dtype, factors_dtype: of the file.
            by_block: what ``loss="auto"`` is.
        """
        given = Training.of(info.settings)
        recomputed = given.activations == "recomputed"
        return cls(
            int(given.steps) or steps,
            learning_rate,
            info.seed,
            dtype,
            factors_dtype,
            checkpointing=recomputed,
            by_block=given.loss == "block" or (given.loss == "auto" and by_block and not recomputed),
        )


class Distillation:
    """A model, the fine-tuned model's outputs on calibration data, and the loop that trains a delta toward them.

    Args:
        module: holds the fine-tuned weights now, and the base's whenever a method is called; left as it was.
        pieces: batches as ``forward`` takes them, of about 8 samples each, at least 2; every eighth is held out.
        forward: a piece to the outputs that are compared, without padding, gradients flowing.
        samples: how many samples the pieces have together.
        blocks: where the module's blocks are, if names do not tell.

    Raises:
        ValueError: fewer than two pieces.

    Warns:
        UserWarning: fewer than 128 samples, or a model whose blocks are not found.
    """

    def __init__(
        self, module: nn.Module, pieces: Sequence[Any], forward: Forward, *, samples: int, blocks: Sequence[str] = ()
    ) -> None:
        if len(pieces) < 2:
            raise ValueError(
                "training needs at least two batches of calibration data, one of which is held out: give more "
                "examples (calibration_samples=, --calibration_samples), a few hundred if there are"
            )
        if samples < FEWEST:
            warnings.warn(
                f"values are trained on {samples} calibration examples; some hundred are better, and with fewer than "
                f"{FEWEST} the held-out ones say little",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # in which a copy would be an inference tensor again
            self.pieces = [tree_map(_plain, piece) for piece in pieces]
        self.module, self.samples = module, samples
        self.held_out = [i for i in range(len(pieces)) if i % HELD_OUT == HELD_OUT // 2] or [len(pieces) - 1]
        self.training = [i for i in range(len(pieces)) if i not in self.held_out]
        self.teacher, self._normalised = Teacher(module, forward, blocks), False
        with evaluating(module):
            self.teacher.learn(self.pieces)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a method's settings that the module cannot be trained by.

        Raises:
            CannotTrain: ``loss="block"`` or ``activations="recomputed"`` of a model for which they are not.
        """
        given = Training.of(settings)
        if given.loss == "block":
            self.teacher.check_blocks()
        if given.activations == "recomputed":
            _with_checkpointing(self.module)

    def loss(self, delta: SparseDelta) -> float:
        """The loss of base plus delta on the held-out pieces: 0 is the fine-tuned model's, 2 the base's."""
        self._normalise()
        with delta.applied(self.module, force=True):
            return self._held_out_loss()

    def base_loss(self) -> float:
        """The loss of the base on the held-out pieces."""
        self._normalise()
        return self._held_out_loss()

    def train(
        self, delta: SparseDelta, settings: TrainingSettings, report: Report | None = None
    ) -> tuple[SparseDelta, tuple[tuple[float, float], ...]]:
        """Train the delta's factors, or where it has none its kept values.

        Adam with a cosine and a short warm-up; the numbers are rounded in the loop to what the file holds. The best of
        the start and of every 25th step on the held-out pieces is returned, so that it is never worse than the start
        there.

        Args:
            delta: where training starts; its values are divided by its q first.
            settings: of the training.
            report: called with the step, all steps, and the loss of the step.

        Returns:
            The delta with trained numbers as the file holds them, in float32 and with q = 1, and (step, held-out loss)
            of all that were looked at. Where no step was better it is the delta that was given, rounded.
        """
        self._normalise()
        with evaluating(self.module), torch.inference_mode(False), torch.enable_grad():
            tensors = TrainedTensors(self.module, delta, settings.dtype, settings.factors_dtype)
            with restored_after(tensors.put_back):
                tensors.freeze()
                tried = self._loop(tensors, settings, report)
                return tensors.delta(), tried

    def _loop(
        self, tensors: TrainedTensors, settings: TrainingSettings, report: Report | None
    ) -> tuple[tuple[float, float], ...]:
        """Train; leaves the best numbers in ``tensors``."""
        with ExitStack() as stack:
            products = stack.enter_context(tensors.products())
            if settings.checkpointing:
                stack.enter_context(_checkpointed(self.module, products.again))
            tensors.write()
            tensors.train_whole(products.unknown_in(self._run_once))
            best, tried = tensors.numbers(), [(0.0, self._held_out_in_training())]
            optimizer = torch.optim.Adam(tensors.groups(settings.learning_rate), betas=BETAS, eps=EPSILON)
            rates = [group["lr"] for group in optimizer.param_groups]
            leaves = tensors.leaves_in(self.teacher.blocks) if settings.by_block else None
            for step, number in enumerate(self._order(settings), 1):
                share = _schedule(step, settings.steps)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                loss = tensors.backward(partial(self._backward, number, leaves))
                optimizer.step()
                tensors.write()
                if report:
                    report(step, settings.steps, loss)
                if step % CHECK_EVERY == 0 or step == settings.steps:
                    tried.append((float(step), self._held_out_in_training()))
                    if tried[-1][1] == min(value for _, value in tried):
                        best = tensors.numbers()
            tensors.set_numbers(best)
        return tuple(tried)

    def _backward(self, number: int, leaves: Sequence[Sequence[Tensor]] | None) -> Tensor:
        """Gradients of the loss on one piece, and the loss; block by block where the leaves of all are given."""
        if leaves is not None:
            return self.teacher.backward_by_block(self.pieces[number], number, leaves)
        loss = self.teacher.loss(self.pieces[number], number)
        take_gradients(loss)
        return loss

    def _order(self, settings: TrainingSettings) -> Iterator[int]:
        """Numbers of the pieces of every step: all of them in a random order, again and again."""
        generator, left = torch.Generator().manual_seed(settings.seed), settings.steps
        while left > 0:
            order = torch.randperm(len(self.training), generator=generator).tolist()[:left]
            yield from (self.training[i] for i in order)
            left -= len(order)

    @torch.no_grad()
    def _run_once(self) -> None:
        self.teacher.run(self.pieces[self.training[0]])

    @torch.no_grad()
    def _held_out_in_training(self) -> float:
        losses = [float(self.teacher.loss(self.pieces[number], number)) for number in self.held_out]
        return sum(losses) / len(losses)

    def _held_out_loss(self) -> float:
        with evaluating(self.module):
            return self._held_out_in_training()

    def _normalise(self) -> None:
        """Take the base's error, which the module holds now, once."""
        if not self._normalised:
            numbers = list(range(len(self.pieces)))[:: -(-len(self.pieces) // _BASE_PIECES)]
            with evaluating(self.module):
                self.teacher.normalise([self.pieces[number] for number in numbers], numbers)
            self._normalised = True


def _schedule(step: int, steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    return min(1.0, step / max(1.0, WARM_UP * steps)) * (1 + cos(pi * step / steps)) / 2


def _plain(leaf: Any) -> Any:
    """A tensor that autograd takes, though it was made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


@contextmanager
def _checkpointed(module: nn.Module, again: Callable[[], Any]) -> Iterator[None]:
    """Have the blocks of a transformers model computed anew in the backward pass, inside the block.

    Training mode is set of these layers alone, without their parts, so that nothing is dropped out.

    Raises:
        ValueError: a model without such layers.
    """
    model = _with_checkpointing(module)
    settings = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), again())}
    before = [(part, _switches(part), set(part._forward_hooks)) for part in module.modules()]

    def restore() -> None:
        for part, switches, hooks in before:
            part.training = False
            for name in _switches(part).keys() - switches.keys():
                delattr(part, name)
            vars(part).update(switches)
            for number in part._forward_hooks.keys() - hooks:
                del part._forward_hooks[number]

    with restored_after(restore):
        _enabling(model)(settings)
        for part in model.modules():
            part.training = part.training or bool(getattr(part, "gradient_checkpointing", False))
        yield


def _with_checkpointing(module: nn.Module) -> nn.Module:
    """The model of transformers in a module.

    Raises:
        CannotTrain: there is none, or it has no gradient checkpointing.
    """
    models = [part for part in module.modules() if hasattr(part, "gradient_checkpointing_enable")]
    if not models or not getattr(models[0], "supports_gradient_checkpointing", False):
        raise CannotTrain(f"{type(module).__name__} has no gradient checkpointing: leave activations=recomputed out")
    return models[0]


_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks")


def _switches(part: nn.Module) -> dict[str, Any]:
    """What transformers sets on a module to have it computed anew."""
    return {name: vars(part)[name] for name in _SWITCHES if name in vars(part)}


def _enabling(model: nn.Module) -> Callable[..., Any]:
    """A method that newer versions of transformers call ``activation_checkpointing_enable``."""
    newer: Callable[..., Any] | None = getattr(model, "activation_checkpointing_enable", None)
    older: Callable[..., Any] | None = getattr(model, "gradient_checkpointing_enable", None)
    found = newer or older
    assert found is not None
    return found
