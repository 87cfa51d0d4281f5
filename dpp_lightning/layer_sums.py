"""S1 and S2 of every layer: sums of c_ij = delta_ij mean(x_j) over the inputs, from which per-layer q follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpp_lightning.pairs import BLOCK, Pair
from dpp_lightning.plan import PruningPlan


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
            sums[pair.name] = _sums(pair)
    owners = {name: name for name in sums}
    for pair in plan.pairs:
        owner = pair.name.rpartition(".")[0] + ".weight"
        if pair.name.endswith(".bias") and owner in sums:
            owners[pair.name] = owner
            delta = torch.cat([block for _, block in pair.deltas()]).double()
            sums[owner] = (sums[owner][0] + delta, sums[owner][1] + delta.square())
    return LayerSums(sums, owners)


def _sums(pair: Pair) -> tuple[Tensor, Tensor]:
    assert pair.inputs is not None
    rows, columns = pair.shape
    mean = pair.inputs.mean[: pair.shape[pair.inputs.axis]]
    s1, s2 = torch.zeros(2, pair.shape[1 - pair.inputs.axis], dtype=torch.float64)
    step = max(BLOCK // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = slice(start * columns, min(start + step, rows) * columns)
        delta = pair.finetuned[part].cpu().double() - pair.base[part].cpu().double()
        delta = delta.view(-1, columns)
        if pair.inputs.axis == 1:
            s1[start : start + step] = delta @ mean
            s2[start : start + step] = delta.square() @ mean.square()
        else:
            s1 += mean[start : start + step] @ delta
            s2 += mean[start : start + step].square() @ delta.square()
    return s1, s2
