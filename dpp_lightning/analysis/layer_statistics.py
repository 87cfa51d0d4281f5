"""Statistics of every layer's delta: its size, what it does to the output, and the outliers among its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dpp_lightning.analysis.theory import bound, kearns_saul
from dpp_lightning.calibration.layer_q import OutputSums
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.tensor_pair import TensorPair

# LLM.int8() (Dettmers et al. 2022) calls a feature an outlier from a magnitude of 6 on where the others are about 1.
OUTLIER = 6.0
# Massive activations (Sun et al. 2024) are above 100 and about 1,000 times the median of their hidden state.
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0


@dataclass(frozen=True)
class Influence:
    """What a delta does to its layer's outputs: c_ij = delta_ij mean(x_j), output i, input j (Theorem 3.1).

    Attributes:
        features: n, the number of inputs.
        magnitude: mean of |c_ij| over all i and j (Table 8).
        mean: mean over j, then the mean of its absolute value over i, since the sign does not enter the bound.
        variance: over j (dividing by n), averaged over i.
        norm_mean, norm_median: of ||c_i|| = sqrt(n (mean_i^2 + variance_i)) over i.
        outliers: input features whose root mean square is at least 6 times the layer's median one.
        massive: input features with an |x_j| above 100 and 1,000 times the layer's median root mean square.
    """

    features: int
    magnitude: float
    mean: float
    variance: float
    norm_mean: float
    norm_median: float
    outliers: tuple[int, ...] = ()
    massive: tuple[int, ...] = ()

    def bound(
        self, pruning_rate: float, gamma: float = 0.95, factor: Callable[[float], float] = kearns_saul
    ) -> tuple[float, float]:
        """Theorem 3.1's bound on the output change under DARE: mean and median over the outputs.

        Args:
            pruning_rate, gamma, factor: as in :func:`dpp_lightning.analysis.theory.bound`.
        """
        unit = bound(pruning_rate, 1.0, 0.0, 1, gamma, factor)  # the bound is proportional to ||c_i||
        return unit * self.norm_mean, unit * self.norm_median


@dataclass(frozen=True)
class LayerStatistics:
    """One pruned tensor.

    Attributes:
        name: canonical name.
        shape: of the entries in common.
        magnitude: mean |delta|.
        largest: maximum of |delta|.
        total: sum of |delta|.
        influence: of a linear map whose inputs are known, otherwise None.
    """

    name: str
    shape: tuple[int, ...]
    magnitude: float
    largest: float
    total: float = field(repr=False)
    influence: Influence | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())


def layer_statistics(pair: TensorPair) -> LayerStatistics:
    """Read one pair of tensors once, in blocks of rows.

    A bias, which Theorem 3.1 would count as one more input that is always 1, has a row of its own.

    Args:
        pair: with its ``inputs`` where they are known; an embedding's are not used: the theorem is of linear maps.

    Raises:
        ValueError: weights that are not finite, or inputs that are not those of this weight.
    """
    inputs = pair.inputs if pair.inputs is not None and pair.inputs.of_one_map else None
    total = torch.zeros((), dtype=torch.float64)
    largest = torch.zeros(())
    sums = None if inputs is None else OutputSums.of(pair)
    for start, delta in pair.row_blocks():
        size = delta.abs()
        total += size.sum(dtype=torch.float64)
        largest = torch.maximum(largest, size.amax())
        if sums is not None:
            sums.add(start, delta)
    if not bool(torch.isfinite(total)):
        raise ValueError(f"{pair.name}: weights that are not finite (NaN or infinity) have no statistics; check them")
    influence = None if inputs is None or sums is None else _influence(sums, *outlier_features(inputs))
    magnitude = float(total) / max(pair.numel, 1)
    return LayerStatistics(pair.name, pair.shape, magnitude, float(largest), float(total), influence)


def mean_magnitude(layers: Sequence[LayerStatistics]) -> float:
    """Mean |delta| over all entries of all layers."""
    return sum(layer.total for layer in layers) / max(sum(layer.numel for layer in layers), 1)


def outlier_features(inputs: InputStatistics) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Outlier features and massive activations among a weight's inputs (DARE the Extreme, Appendix D).

    The paper names them by their plots alone, so the thresholds are those of the works that it cites, relative to the
    median of the features that are not always 0. They are seen as the weight sees them: behind a norm, which shrinks
    massive activations.

    Args:
        inputs: of a linear map.

    Returns:
        Indices of the features of either kind, in order.
    """
    live = inputs.rms[inputs.rms > 0]
    if not len(live):
        return (), ()
    median = float(live.median())
    outliers = torch.nonzero(inputs.rms >= OUTLIER * median).flatten().tolist()
    if inputs.largest is None:
        return tuple(outliers), ()
    massive = torch.nonzero(inputs.largest > max(MASSIVE, MASSIVE_RATIO * median)).flatten().tolist()
    return tuple(outliers), tuple(massive)


def _influence(sums: OutputSums, outliers: tuple[int, ...], massive: tuple[int, ...]) -> Influence:
    """The statistics, once all rows are in."""
    n = max(len(sums.mean), 1)
    mean, norm = sums.first / n, sums.second.sqrt()
    if not len(norm):
        return Influence(len(sums.mean), 0.0, 0.0, 0.0, 0.0, 0.0, outliers, massive)
    variance = (sums.second / n - mean.square()).clamp_min(0)
    return Influence(
        features=len(sums.mean),
        magnitude=float((sums.absolute / n).mean()),
        mean=float(mean.abs().mean()),
        variance=float(variance.mean()),
        norm_mean=float(norm.mean()),
        norm_median=float(norm.quantile(0.5)),
        outliers=outliers,
        massive=massive,
    )
