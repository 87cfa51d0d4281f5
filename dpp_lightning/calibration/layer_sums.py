"""S1 and S2 of every layer: sums of c_ij = delta_ij mean(x_j) over the inputs, from which per-layer q follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.pruning.plan import PruningPlan


@dataclass
class OutputSums:
    """Running sums over the inputs j of c_ij = delta_ij mean(x_j), for every output i of one linear map.

    Attributes:
        mean: mean(x_j), float64, shape (features,).
        axis: the weight's dimension of the features.
        first, second, absolute: sums of c_ij, its square and its absolute value, float64, shape (outputs,).
    """

    mean: Tensor
    axis: int
    first: Tensor
    second: Tensor
    absolute: Tensor

    @classmethod
    def of(cls, pair: TensorPair) -> OutputSums:
        """Nothing summed yet.

        Raises:
            ValueError: the inputs are not those of this weight.
        """
        inputs = pair.inputs
        if inputs is None or len(pair.shape) != 2 or len(inputs.total) != pair.shape[inputs.axis]:
            known = "unknown" if inputs is None else f"of {len(inputs.total)} features along dimension {inputs.axis}"
            raise ValueError(
                f"{pair.name}: inputs {known}, but the weight's shape is {pair.shape}; collect them from the "
                "fine-tuned model itself"
            )
        outputs = pair.shape[1 - inputs.axis]
        return cls(inputs.mean, inputs.axis, *torch.zeros(3, outputs, dtype=torch.float64))

    def add(self, start: int, delta: Tensor) -> None:
        """Rows of the weight from ``start`` on, shape (rows, columns)."""
        rows, delta = slice(start, start + len(delta)), delta.double()
        if self.axis == 1:
            self.first[rows] = delta @ self.mean
            self.second[rows] = delta.square() @ self.mean.square()
            self.absolute[rows] = delta.abs() @ self.mean.abs()
        else:
            self.first += self.mean[rows] @ delta
            self.second += self.mean[rows].square() @ delta.square()
            self.absolute += self.mean[rows].abs() @ delta.abs()


@dataclass(frozen=True)
class LayerSums:
    """The sums of all linear maps.

    Attributes:
        of_weight: name of a weight to (S1, S2), float64, shape (outputs,) each.
        weight_of: name of a bias to that of its layer's weight, and of a weight to itself.
    """

    of_weight: dict[str, tuple[Tensor, Tensor]]
    weight_of: dict[str, str]


def layer_sums(plan: PruningPlan) -> LayerSums:
    """One pass over the deltas of all linear maps whose inputs are known; a bias counts as one more column."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for pair in plan.pairs:
        if pair.inputs is not None and not pair.inputs.embedding:
            found = OutputSums.of(pair)
            for start, delta in pair.row_blocks():
                found.add(start, delta)
            sums[pair.name] = (found.first, found.second)
    owners = {name: name for name in sums}
    for pair in plan.pairs:
        owner = pair.name.rpartition(".")[0] + ".weight"
        if pair.name.endswith(".bias") and owner in sums:
            owners[pair.name] = owner
            delta = torch.cat([block for _, block in pair.deltas()]).double()
            sums[owner] = (sums[owner][0] + delta, sums[owner][1] + delta.square())
    return LayerSums(sums, owners)
