"""Gradients on the calibration batch, for the methods that train their rescaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dpp_lightning.calibration.evaluation_mode import evaluating
from dpp_lightning.calibration.output_change import TOP_OF_CODE, logits_that_count, top_logits_error
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.tensors.flat_entries import gather_entries
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import named_tensors

PIECES = 4  # of the calibration batch; the last is held out for early stopping


class BatchGradients:
    """A module on pieces of one batch, against the outputs that it gave with the fine-tuned weights.

    Args:
        module: holds the fine-tuned weights now, and the base's when :meth:`loss` and :meth:`gradients` are called.
        batch: the calibration batch, of at least 4 samples, on the module's device.
        forward: a batch to the logits (samples, ..., classes), in evaluation mode, through which gradients flow.

    Raises:
        ValueError: a batch of less than 4 samples.
    """

    def __init__(self, module: nn.Module, batch: Any, forward: Callable[[Any], Tensor]) -> None:
        self.module, self.forward, self.pieces = module, forward, _cut(batch)
        self.batches = len(self.pieces)
        with evaluating(module), torch.no_grad():
            self.reference = [self.forward(piece).detach().clone() for piece in self.pieces]
        self._counted = logits_that_count(module, self.reference[0], TOP_OF_CODE)

    def loss(self, delta: SparseDelta, batch: int) -> float:
        """See :class:`dpp_lightning.calibration.calibration_data.OutputGradients`."""
        with delta.applied(self.module, force=True), evaluating(self.module), torch.no_grad():
            return float(top_logits_error(self.reference[batch], self.forward(self.pieces[batch]), self._counted))

    def gradients(self, delta: SparseDelta, batch: int) -> dict[str, Tensor]:
        """See :class:`dpp_lightning.calibration.calibration_data.OutputGradients`."""
        named = {n.name: n for n in named_tensors(self.module)}
        targets = {name: named[in_module] for name, in_module in match_names(delta.tensors, named).items()}
        owners = {id(owner): owner for target in targets.values() for owner, _ in target.pieces}
        frozen = [tensor for tensor in owners.values() if not tensor.requires_grad]
        applied = delta.applied(self.module, force=True)
        with applied, evaluating(self.module), torch.inference_mode(False), torch.enable_grad():
            try:
                for tensor in frozen:
                    tensor.requires_grad_(True)
                piece, reference = tree_map(_normal, (self.pieces[batch], self.reference[batch]))
                loss = top_logits_error(reference, self.forward(piece), self._counted)
                gradients = torch.autograd.grad(loss, list(owners.values()), allow_unused=True)
            finally:
                for tensor in frozen:
                    tensor.requires_grad_(False)
        of_owner = {key: gradient for key, gradient in zip(owners, gradients, strict=True) if gradient is not None}
        return {
            name: gather_entries(target.of(of_owner), delta.tensors[name].indices).cpu()
            for name, target in targets.items()
            if all(id(owner) in of_owner for owner, _ in target.pieces)
        }


def _cut(batch: Any) -> list[Any]:
    """Every fourth sample, four times."""
    if isinstance(batch, Mapping):
        batch = dict(batch.items())  # mappings of other types are no trees to torch
    sizes: list[int] = []
    tree_map(lambda leaf: sizes.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.dim() else None, batch)
    samples = max(sizes, default=0)
    if samples < PIECES:
        raise ValueError(
            f"darex-learned trains on {PIECES - 1} pieces of the calibration batch and holds one out: it needs at "
            f"least {PIECES} samples, got {samples}; give more calibration samples"
        )

    def every_fourth(leaf: Any, first: int) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples
        return leaf[first::PIECES] if whole else leaf

    return [tree_map(lambda leaf, i=i: every_fourth(leaf, i), batch) for i in range(PIECES)]


def _normal(leaf: Any) -> Any:
    """A tensor that autograd takes, though it was made in inference mode."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
