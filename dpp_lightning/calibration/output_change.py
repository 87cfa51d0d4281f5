"""What pruning does to a model's outputs: recorded at one of its layers, and compared with the fine-tuned model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Measure = Literal["mean", "top-logits"]
MEASURES: tuple[str, ...] = get_args(Measure)
Reduce = Callable[[int, Tensor], Tensor]

TOP_OF_CODE = 5  # logits that count in the squared error, as in the released code for decoders
_MANY_CLASSES = 4096  # from which on an output is treated as logits over a vocabulary


class OutputChange:
    """How far the model as it stands is from the fine-tuned one, on a fixed batch.

    ``mean`` is the mean absolute difference (DAREx Algorithm 2, objective e, as the released code has it for encoders);
    ``top-logits`` the mean squared difference over the fine-tuned model's five largest logits at each position (the
    released code for decoders), for which no more than these are kept.

    Args:
        run: gives the layer's outputs on the batch, each passed with its number through a function before it is kept.
        measure: one of :data:`MEASURES`.
    """

    def __init__(self, run: Callable[[Reduce], list[Tensor]], measure: Measure = "mean") -> None:
        self.run, self.measure = run, measure
        self._reference: list[Tensor] = []
        self._top: list[Tensor | None] = []

    def take_reference(self) -> None:
        """Remember the outputs of the fine-tuned model, which the model holds now."""
        self._top = []
        self._reference = self.run(self._largest if self.measure == "top-logits" else _whole)

    def __call__(self) -> float:
        """The change of the outputs; more is worse."""
        if self.measure == "mean":
            return output_change(self._reference, self.run(_whole))
        outputs = self.run(lambda number, output: _taken(output, self._top[number]).float())
        total = sum(_difference(a, b).square().sum().item() for a, b in zip(self._reference, outputs, strict=True))
        return float(total) / max(sum(t.numel() for t in outputs), 1)

    def _largest(self, number: int, output: Tensor) -> Tensor:
        self._top.append(largest(output, TOP_OF_CODE))
        return _taken(output, self._top[-1]).float()


def _whole(number: int, output: Tensor) -> Tensor:
    return output


def _difference(reference: Tensor, output: Tensor) -> Tensor:
    """Their difference, 0 where both are the same infinity, as of classes that a model masks."""
    return torch.where(reference == output, 0.0, reference - output)


def output_change(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Mean absolute difference over all entries of two sets of outputs (DAREx Algorithm 2, objective e).

    Args:
        reference, outputs: tensors of equal shapes, in the same order.

    Raises:
        ValueError: no outputs, or shapes that differ.
    """
    if not reference or [t.shape for t in reference] != [t.shape for t in outputs]:
        raise ValueError(
            f"outputs of shapes {[tuple(t.shape) for t in outputs]} cannot be compared with the fine-tuned model's "
            f"{[tuple(t.shape) for t in reference]}; the calibration batch must be the same for both"
        )
    total = sum(_difference(a.double(), b.double()).abs().sum().item() for a, b in zip(reference, outputs, strict=True))
    return float(total) / max(sum(t.numel() for t in reference), 1)


def top_logits_error(reference: Tensor, outputs: Tensor, most: int = TOP_OF_CODE) -> Tensor:
    """Mean squared difference over the fine-tuned model's top-min(5, classes) logits (released code for decoders).

    Args:
        reference: the fine-tuned model's logits, (..., classes), or one number a sample.
        outputs: the pruned model's, of the same shape; may carry gradients.
        most: logits that count.
    """
    top = largest(reference, most)
    return (_taken(outputs, top) - _taken(reference, top)).square().mean()


def largest(output: Tensor, most: int) -> Tensor | None:
    """Places of the largest numbers along the last dimension, shape (..., most); None where all of them count.

    Args:
        output: shape (..., classes); of one dimension it is a number of each sample, which all count.
        most: how many.
    """
    if output.dim() < 2 or output.shape[-1] <= most:
        return None
    return output.float().topk(most, dim=-1).indices


def logits_that_count(module: nn.Module, output: Tensor, most: int) -> int:
    """How many numbers along an output's last dimension are compared in training.

    Of logits over a vocabulary the largest say what is predicted. Of other outputs, such as classes, embeddings,
    reconstructed inputs or maps of an image, every number does.

    Args:
        module: whose output it is. A vocabulary has as many entries as its largest embedding has rows, or more than
            4,096.
        output: shape (..., classes).
        most: of a vocabulary's.
    """
    rows = max((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=0)
    width = output.shape[-1] if output.dim() else 1
    return most if width == rows or width > _MANY_CLASSES else width


def _taken(output: Tensor, places: Tensor | None) -> Tensor:
    return output if places is None else output.gather(-1, places)


@contextmanager
def recorded_outputs(module: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    """Collect what a submodule returns in every forward inside the block, detached.

    Args:
        module: the model.
        layer: name as in ``named_modules()``; None takes the last one that directly holds parameters.

    Raises:
        ValueError: no such submodule.
    """
    outputs: list[Tensor] = []
    target = dict(module.named_modules())[resolve_layer(module, layer)]
    handle = target.register_forward_hook(lambda _m, _i, out: outputs.append(_first_tensor(out).detach().clone()))
    try:
        yield outputs
    finally:
        handle.remove()


def resolve_layer(module: nn.Module, layer: str | None) -> str:
    """The name of the submodule whose output is compared; default the last with parameters of its own that is called.

    Raises:
        ValueError: no such submodule, with the nearest names.
    """
    names = [
        name
        for name, m in module.named_modules()
        if next(m.parameters(recurse=False), None) is not None
        and not isinstance(m, nn.ParameterList | nn.ParameterDict)
    ]
    if layer is None:
        if not names:
            raise ValueError(f"{type(module).__name__} has no submodule with parameters")
        return names[-1]
    if layer not in dict(module.named_modules()):
        raise ValueError(f"output_layer {layer!r} is no submodule; the last ones with parameters are {names[-4:]}")
    return layer


def _first_tensor(output: Any) -> Tensor:
    """The tensor of an output that may be a tensor, a tuple or a mapping (a transformers ModelOutput)."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    for item in items:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise ValueError(f"the output layer returned {type(output).__name__} without a floating-point tensor in it")
