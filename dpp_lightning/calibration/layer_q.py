"""One q a layer (DAREx, per-layer **q**), from one eta and sums of c_ij = delta_ij mean(x_j) over a layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, weighted
from dpp_lightning.calibration.q_search import search_eta
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate, layer_q
from dpp_lightning.methods.tensor_pair import TensorPair


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


def layer_sums(pairs: Sequence[TensorPair]) -> LayerSums:
    """One pass over the deltas of all linear maps whose inputs are known; a bias counts as one more column."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for pair in pairs:
        if pair.inputs is not None and pair.inputs.of_one_map:
            output_sums = OutputSums.of(pair)
            for start, delta in pair.row_blocks():
                output_sums.add(start, delta)
            sums[pair.name] = (output_sums.first, output_sums.second)
    weight_of = {name: name for name in sums}
    for pair in pairs:
        weight = pair.name.rpartition(".")[0] + ".weight"
        if pair.name.endswith(".bias") and weight in sums:
            weight_of[pair.name] = weight
            delta = torch.cat([block for _, block in pair.deltas()]).double()
            sums[weight] = (sums[weight][0] + delta, sums[weight][1] + delta.square())
    return LayerSums(sums, weight_of)


def fit_layer_q(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """One q a layer in closed form, with the eta that serves the whole model best.

    Args:
        calibrator: its pairs know the inputs of the layers.
        delta: kept entries with undivided float32 values, q = 1 - p.
    """
    sums = layer_sums(calibrator.pairs)
    rows = delta.info.settings.get("rows", "mean")

    def with_eta(eta: float) -> Callable[[SparseDelta], SparseDelta]:
        weights = _layer_weights(sums, delta.tensors, delta.pruning_rate, eta, rows)
        return lambda other: weighted(other, weights, eta=eta)

    result = search_eta(lambda eta: calibrator.cost(with_eta(eta)(delta)), smooth=calibrator.objective.smooth)
    return FoundRescaling(with_eta(result.q), result.tried)


def _layer_weights(sums: LayerSums, names: Iterable[str], rate: float, eta: float, rows: Any) -> dict[str, float]:
    """(1 - p) / q of every tensor: its layer's, or that of the mean q of all layers where it has no inputs."""
    q = {name: layer_q(*pair, rate, eta, rows=rows) for name, pair in sums.of_weight.items()}
    mean = sum(q.values()) / len(q) if q else keep_rate(rate)
    return {name: keep_rate(rate) / q.get(sums.weight_of.get(name, name), mean) for name in names}
