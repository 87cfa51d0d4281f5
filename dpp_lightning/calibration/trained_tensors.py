"""The numbers of a delta that are trained, while the module holds the base's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.calibration.kept_products import KeptProducts, TrainedWeight
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.tensors.dtypes import to_dtype
from dpp_lightning.tensors.factors import Factors
from dpp_lightning.tensors.flat_entries import gather_entries, scatter_entries
from dpp_lightning.tensors.names import NamedTensor

_LEAST_SCALE = 1e-5


@dataclass
class _Trained:
    """One tensor: where it lies in the module, its numbers, and the base's values beneath.

    Attributes:
        named: in the module.
        start: as the delta had it.
        leaves: the trained numbers: ``values``, or ``left`` and ``right``, or ``left`` alone of a tensor of one column.
        base: the base's values where the module is written: at the kept entries, or all of them.
        whole: the gradient is taken of the whole tensor, and all of the tensor is written.
    """

    named: NamedTensor
    start: SparseTensor
    leaves: dict[str, Tensor]
    base: Tensor
    whole: bool

    @property
    def positions(self) -> Tensor | None:
        """Where the module is written; None for all entries."""
        return None if self.whole else self.start.indices.long()


class TrainedTensors:
    """The trained numbers of a delta, and the module with them.

    Factors are trained where the delta has any, and its kept values stay beneath them as they are; kept values
    otherwise.

    Args:
        module: holds the base's weights; from :meth:`freeze` on it is changed, until :meth:`put_back`.
        delta: where training starts.
        dtype, factors_dtype: that the numbers are rounded to, straight through; None for none.

    Raises:
        ValueError: the module lacks tensors of the delta.
    """

    def __init__(self, module: nn.Module, delta: SparseDelta, dtype: str | None, factors_dtype: str | None) -> None:
        self.module, self.start, self.dtype, self.factors_dtype = module, delta, dtype, factors_dtype
        self.of_factors = any(tensor.factors is not None for tensor in delta.tensors.values())
        self._frozen = [p for p in module.parameters() if p.requires_grad]
        _, named = delta.find_in(module)
        self.tensors = {
            name: self._prepared(named[name], tensor)
            for name, tensor in delta.tensors.items()
            if tensor.factors is not None or tensor.values.numel()
        }

    def freeze(self) -> None:
        """Take no gradients of the module's own parameters, until :meth:`put_back`."""
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _prepared(self, named: NamedTensor, tensor: SparseTensor) -> _Trained:
        leaves = {}
        if tensor.factors is not None:
            leaves["left"] = tensor.factors.left.float().clone()
            if not tensor.factors.is_whole:
                leaves["right"] = tensor.factors.right.float().clone()
        elif not self.of_factors:
            leaves["values"] = tensor.values.float() / self.start.q
        device = named.owner.device
        leaves = {kind: leaf.to(device).requires_grad_(True) for kind, leaf in leaves.items()}
        one_column = tensor.factors is not None and tensor.factors.is_whole
        whole = not named.whole or named.owner.dim() < 2 or one_column
        base = named.tensor.detach().reshape(-1).clone() if whole else gather_entries(named.tensor, tensor.indices)
        return _Trained(named, tensor, leaves, base, whole)

    def products(self) -> KeptProducts:
        """A mode in which products by the weights have gradients to the trained numbers."""
        weights = {}
        for trained in self.tensors.values():
            if not trained.whole:
                weights[id(trained.named.owner)] = self._weight(trained)
        self._products = KeptProducts(weights)
        return self._products

    def _weight(self, trained: _Trained) -> TrainedWeight:
        positions = trained.start.indices.long().to(trained.named.owner.device)
        return TrainedWeight(positions, trained.leaves.get("values"))

    def train_whole(self, owners: Iterable[int]) -> None:
        """Take the gradient of whole weights: of these owners, which are used in ways that are not known."""
        unknown = set(owners)
        for trained in self.tensors.values():
            owner = trained.named.owner
            if not trained.whole and id(owner) in unknown:
                with torch.no_grad():
                    scatter_entries(owner, trained.start.indices, trained.base)
                trained.whole, trained.base = True, owner.detach().reshape(-1).clone()
                self._products.weights.pop(id(owner), None)
        for trained in self.tensors.values():
            if trained.whole:
                for owner, _ in trained.named.pieces:
                    owner.requires_grad_(True)
        self.write()

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Groups of parameters for an optimizer: factors each at a rate that suits the size of their numbers."""
        groups = []
        for trained in self.tensors.values():
            for kind, leaf in trained.leaves.items():
                scale = float(leaf.detach().square().mean().sqrt()) if kind != "values" and leaf.numel() else 1.0
                rate = learning_rate if kind == "values" else learning_rate * max(scale, _LEAST_SCALE)
                groups.append({"params": [leaf], "lr": rate})
        return groups

    def write(self) -> None:
        """Put the numbers as they are into the module, rounded: kept values into weights, factors beside them."""
        for trained in self.tensors.values():
            factors = self._factors(trained)
            if trained.whole:
                change = self._rounded(trained).dense(1.0 if "values" in trained.leaves else self.start.q)
                with torch.no_grad():
                    target = trained.named.tensor.detach()
                    sums = trained.base.float() + change.reshape(-1).to(trained.base.device)
                    target.copy_(sums.view(target.shape).to(target.dtype))
                    trained.named.store(target)
                continue
            with torch.no_grad():
                values = self._values(trained)
                sums = trained.base.float() + values.to(trained.base.device).float()
                scatter_entries(trained.named.owner, trained.start.indices, sums.to(trained.base.dtype))
            if factors is not None:
                part = self._products.weights[id(trained.named.owner)]
                part.left, part.right = factors

    def _values(self, trained: _Trained) -> Tensor:
        """The kept values as the file holds them, divided by q."""
        if "values" not in trained.leaves:
            return trained.start.values / self.start.q
        values = trained.leaves["values"].detach()
        return to_dtype(values, self.dtype, values, "trained values") if self.dtype else values

    def _factors(self, trained: _Trained) -> tuple[Tensor, Tensor] | None:
        """Left and right factors, rounded straight through."""
        if "left" not in trained.leaves:
            return None
        left, right = trained.leaves["left"], trained.leaves.get("right")
        if right is None:
            return None
        held = Factors(left.detach(), right.detach()).rounded(self.factors_dtype)
        return left + (held.left - left.detach()), right + (held.right - right.detach())

    def _rounded(self, trained: _Trained) -> SparseTensor:
        """The tensor of the delta as the file holds it."""
        factors = None
        if "left" in trained.leaves:
            left = trained.leaves["left"].detach().cpu()
            right = trained.leaves["right"].detach().cpu() if "right" in trained.leaves else torch.ones(1, 1)
            factors = Factors(left, right).rounded(self.factors_dtype)
        values = trained.start.values
        if "values" in trained.leaves:
            values = self._values(trained).cpu()
        return SparseTensor(trained.start.shape, trained.start.indices, values, factors)

    def backward(self, backward: Callable[[], Tensor]) -> float:
        """Gradients into the leaves, those of whole weights by way of theirs.

        Args:
            backward: runs the module and the pass backward, and returns the loss.
        """
        for trained in self.tensors.values():
            for leaf in trained.leaves.values():
                leaf.grad = None
        loss = float(backward().detach())
        owners = {id(o): o for t in self.tensors.values() if t.whole for o, _ in t.named.pieces}
        gradients = {key: owner.grad for key, owner in owners.items() if owner.grad is not None}
        for trained in self.tensors.values():
            if trained.whole and all(id(owner) in gradients for owner, _ in trained.named.pieces):
                self._spread(trained, trained.named.of(gradients).float())
        for owner in owners.values():
            owner.grad = None
        return loss

    def _spread(self, trained: _Trained, gradient: Tensor) -> None:
        """The gradient of a whole tensor as those of its trained numbers."""
        leaves = trained.leaves
        if "values" in leaves:
            leaves["values"].grad = gradient.reshape(-1)[trained.start.indices.long()].to(leaves["values"])
        if "right" in leaves:
            left, right = leaves["left"].detach(), leaves["right"].detach()
            matrix = gradient.reshape(left.shape[0], right.shape[1]).to(left.device)
            leaves["left"].grad, leaves["right"].grad = matrix @ right.t(), left.t() @ matrix
        elif "left" in leaves:
            leaves["left"].grad = gradient.reshape(-1, 1).to(leaves["left"].device)

    def leaves_in(self, parts: Sequence[nn.Module]) -> list[list[Tensor]]:
        """What is trained in each of some parts of the module, and last what is trained in none of them."""
        owners = [{id(p) for p in part.parameters()} for part in parts]
        found: list[list[Tensor]] = [[] for _ in range(len(parts) + 1)]
        for trained in self.tensors.values():
            for owner, _ in trained.named.pieces:
                holding = [i for i, ids in enumerate(owners) if id(owner) in ids] or [len(parts)]
                for i in holding:
                    found[i] += [owner] if trained.whole else trained.leaves.values()
        return [list({id(leaf): leaf for leaf in leaves}.values()) for leaves in found]

    def numbers(self) -> dict[str, dict[str, Tensor]]:
        """A copy of all trained numbers."""
        return {
            name: {kind: leaf.detach().clone() for kind, leaf in trained.leaves.items()}
            for name, trained in self.tensors.items()
        }

    def set_numbers(self, numbers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what :meth:`numbers` gave."""
        with torch.no_grad():
            for name, leaves in numbers.items():
                for kind, leaf in leaves.items():
                    self.tensors[name].leaves[kind].copy_(leaf)

    def delta(self) -> SparseDelta:
        """The delta with the numbers as the file holds them, in float32; of trained values q is 1."""
        tensors = dict(self.start.tensors)
        tensors |= {name: self._rounded(trained) for name, trained in self.tensors.items()}
        return self.start.with_changes(tensors, q=self.start.q if self.of_factors else 1.0)

    def put_back(self) -> None:
        """The base's weights, and which parameters need gradients, as they were; may be called again."""
        with torch.no_grad():
            for trained in self.tensors.values():
                for owner, _ in trained.named.pieces:
                    owner.requires_grad_(False)
                    owner.grad = None
                if trained.whole:
                    target = trained.named.tensor.detach()
                    target.copy_(trained.base.view(target.shape))
                    trained.named.store(target)
                else:
                    scatter_entries(trained.named.owner, trained.start.indices, trained.base)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
