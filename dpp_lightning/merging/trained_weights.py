"""Base plus weighted deltas inside a module, with gradients for the weights alone and no copy of the model.

The merged values are written over the module's own at the kept entries. What a forward uses of a tensor is its own
storage, as the result of an autograd function whose backward turns the tensor's gradient into one number for each
delta: dL/d lambda_k = sum over the kept entries of dL/d theta * delta_k. That gradient is dense, but one tensor's at a
time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.merging.sources import MergeSource, names_in_base
from dpp_lightning.methods.merge_rules import union_of
from dpp_lightning.tensors.flat_entries import gather_entries, scatter_entries
from dpp_lightning.tensors.names import describe_source, named_tensors


class MergedTensor(nn.Module):
    """One tensor of the base and the kept entries that the deltas have in it.

    Args:
        tensor: the module's parameter; overwritten by :meth:`write`.
        entries: number of the delta to (indices, values), values divided by q.
    """

    union: Tensor
    original: Tensor

    def __init__(self, tensor: Tensor, entries: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._in_tuple = (tensor,)  # so that it does not become a parameter of this module too
        self.deltas = sorted(entries)
        union = union_of([entries[k][0] for k in self.deltas], tensor.numel())
        self.register_buffer("union", union.positions, persistent=False)
        self.register_buffer("original", gather_entries(tensor, union.positions), persistent=False)
        for k, indices in zip(self.deltas, union.ranks(), strict=True):
            self.register_buffer(f"indices{k}", indices, persistent=False)
            self.register_buffer(f"values{k}", entries[k][1].float(), persistent=False)

    @property
    def tensor(self) -> Tensor:
        """The module's parameter."""
        return self._in_tuple[0]

    def write(self, weights: Tensor) -> None:
        """Overwrite the kept entries with theta_0 + sum_k weights_k delta_k; ``weights``: (deltas,)."""
        total = self.original.float()
        for k in self.deltas:
            total = total.index_add(0, getattr(self, f"indices{k}"), getattr(self, f"values{k}") * weights[k])
        scatter_entries(self.tensor, self.union, total.to(self.tensor.dtype))

    def restore(self) -> None:
        """Put the base's values back, bit for bit."""
        scatter_entries(self.tensor, self.union, self.original)

    def weight_gradient(self, gradient: Tensor, like: Tensor) -> Tensor:
        """The gradient of the weights, (deltas,), from that of the tensor; dtype and device as ``like``."""
        at_union = gather_entries(gradient, self.union).float()
        weight_gradient = torch.zeros_like(like)
        for k in self.deltas:
            weight_gradient[k] = (at_union[getattr(self, f"indices{k}")] * getattr(self, f"values{k}")).sum()
        return weight_gradient


class _UseMerged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, merged: MergedTensor) -> Tensor:
        ctx.merged = merged
        ctx.save_for_backward(weights)
        return merged.tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return ctx.merged.weight_gradient(gradients[0], weights), None


class MergedTensors(nn.Module):
    """All tensors of a base that some delta changes.

    Args:
        module: holds the base's weights.
        sources: the deltas.

    Attributes:
        names: canonical names of these tensors, in the order of the coefficients' rows.

    Raises:
        ValueError: a delta of another base, of tensors that the module lacks, or of parts of the module's tensors (the
            experts of a mixture, which are one tensor in memory).
    """

    def __init__(self, module: nn.Module, sources: Sequence[MergeSource]) -> None:
        super().__init__()
        named = {n.name: n for n in named_tensors(module)}
        base = {name: n.tensor for name, n in named.items()}
        entries: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        names_of_each = names_in_base(sources, base, describe_source(module))
        for k, (source, names) in enumerate(zip(sources, names_of_each, strict=True)):
            for name, tensor in source.checked(base, names):
                change, divisor = tensor.change(source.info.q)
                entries.setdefault(name, {})[k] = (tensor.changed, change.float() / divisor)
        self.names = sorted(entries)
        if parts := [name for name in self.names if not named[name].whole]:
            raise ValueError(
                f"{len(parts)} tensors of the deltas are parts of larger ones in the module, such as {parts[0]}: "
                "weights for them cannot be trained; merge with fixed weights (dpp merge)"
            )
        self._module_names = [named[name].source for name in self.names]
        self.merged = nn.ModuleList(MergedTensor(base[name], entries[name]) for name in self.names)

    def write(self, coefficients: Tensor) -> None:
        """Let the module hold the merged weights; ``coefficients``: (tensors, deltas) or (1, deltas)."""
        with torch.no_grad():
            for merged, weights in zip(self.merged, self._rows(coefficients), strict=True):
                merged.write(weights)  # type: ignore[operator]

    def restore(self) -> None:
        """Let the module hold the base's weights again."""
        for merged in self.merged:
            merged.restore()  # type: ignore[operator]

    def tensors(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The module's own name of each tensor to its value as :meth:`write` left it, for ``functional_call``."""
        rows = self._rows(coefficients)
        return {
            name: _UseMerged.apply(weights, merged)
            for name, weights, merged in zip(self._module_names, rows, self.merged, strict=True)
        }

    def _rows(self, coefficients: Tensor) -> list[Tensor]:
        """The weights of the deltas in each tensor; one row serves all tensors."""
        return [coefficients[min(i, len(coefficients) - 1)] for i in range(len(self.merged))]
