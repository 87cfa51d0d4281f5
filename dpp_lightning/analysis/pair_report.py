"""Of a base and a model fine-tuned from it: every layer's delta, the bounds on what DARE does, the method to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dpp_lightning.analysis.layer_statistics import LayerStatistics, layer_statistics, mean_magnitude
from dpp_lightning.analysis.theory import (
    Recommendation,
    berend_kontorovich,
    hoeffding,
    kearns_saul,
    recommend,
    recommend_few_bytes,
)
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.rescaling import keep_rate
from dpp_lightning.pruning.finetuned_source import read_finetuned
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import load_tensors, total_bytes
from dpp_lightning.storage.source_kind import check_model

GAMMA = 0.95
_FACTORS = {"hoeffding": hoeffding, "kearns_saul": kearns_saul, "berend_kontorovich": berend_kontorovich}


@dataclass(frozen=True)
class PairReport:
    """A base and a model fine-tuned from it.

    Attributes:
        base, finetuned: their names.
        pruning_rate: p that factors and bounds are of.
        layers: the tensors that have a delta.
        unchanged, carried: names of those that training left as they were, and of those that the base does not have.
        factors: of Fig. 10 at p; Berend and Kontorovich's, which is no guarantee, only from p = 1/2 on.
        recommendation: by Fig. 4.
        few_bytes: what keeps most of the score in a file of some ten kB, by what was measured.
    """

    base: str
    finetuned: str
    pruning_rate: float
    layers: tuple[LayerStatistics, ...]
    unchanged: tuple[str, ...]
    carried: tuple[str, ...]
    factors: dict[str, float]
    recommendation: Recommendation
    few_bytes: Recommendation

    @property
    def mean_delta(self) -> float:
        """Mean |delta| over all entries of the layers."""
        return mean_magnitude(self.layers)

    def share(self, layer: LayerStatistics) -> float:
        """A layer's part of the sum of |delta| of all layers."""
        return layer.total / (sum(row.total for row in self.layers) or 1.0)

    def to_json(self) -> dict[str, Any]:
        """Everything, for :func:`json.dumps`; a bound is the mean and the median over a layer's outputs."""
        rows = []
        for layer in self.layers:
            row = {**asdict(layer), "share": self.share(layer), "numel": layer.numel}
            if layer.influence:
                row["bounds"] = {
                    name: dict(zip(("mean", "median"), layer.influence.bound(self.pruning_rate, GAMMA, f), strict=True))
                    for name, f in _FACTORS.items()
                    if name in self.factors
                }
            rows.append(row)
        return {**asdict(self), "layers": rows, "mean_delta": self.mean_delta, "gamma": GAMMA}


def inspect_pair(
    base: str,
    finetuned: str,
    pruning_rate: float = 0.9,
    *,
    calibration: str | None = None,
    calibration_samples: int = 64,
    labels: bool = False,
    can_retrain: bool = False,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> PairReport:
    """Read both models, one pair of tensors at a time.

    Args:
        base, finetuned: folders, files or hub ids, see :func:`dpp_lightning.storage.checkpoints.load_tensors`.
        pruning_rate: p in [0, 1) of factors and bounds.
        calibration: file of data as in :class:`dpp_lightning.pruning.file_calibration.FileCalibration`; None leaves
            the inputs out.
        calibration_samples: how many of its examples are used at most.
        labels, can_retrain: as in :func:`dpp_lightning.analysis.theory.recommend`.
        base_revision, finetuned_revision: of hub ids.
        progress: called with the bytes of both models that are done, and with all of them.

    Raises:
        ValueError: a rate outside, models that are equal or do not match, weights that are not finite, or a
            calibration file that does not fit the model.
        FileNotFoundError: no such model or calibration file.
    """
    kept = keep_rate(pruning_rate)
    factors = {name: f(pruning_rate) for name, f in _FACTORS.items() if f is not berend_kontorovich or kept <= 0.5}
    check_model(base, "base", base_revision)
    check_model(finetuned, "finetuned", finetuned_revision)
    tuned = read_finetuned(finetuned, finetuned_revision, base=base, base_revision=base_revision)
    plan = PruningPlan.of(load_tensors(base, base_revision), tuned.tensors, Scope(), files=tuned.exact)
    plan.checks.check_changed()
    if calibration is not None:
        plan = plan.with_inputs(_layer_inputs(finetuned, finetuned_revision, calibration, calibration_samples))
    sizes = [total_bytes({"base": pair.base, "finetuned": pair.finetuned}) for pair in plan.pairs]
    layers = []
    for count, pair in enumerate(plan.pairs, 1):
        plan.checks.check_finite(pair.name)
        layers.append(layer_statistics(pair))
        if progress:
            progress(sum(sizes[:count]), sum(sizes))
    advice = recommend(mean_magnitude(layers), labels=labels, can_retrain=can_retrain, inputs=calibration is not None)
    unchanged, carried = tuple(sorted(plan.unchanged)), tuple(plan.carried)
    small = recommend_few_bytes(texts=calibration is not None)
    return PairReport(base, finetuned, pruning_rate, tuple(layers), unchanged, carried, factors, advice, small)


def _layer_inputs(source: str, revision: str | None, data: str, samples: int) -> dict[str, InputStatistics]:
    from dpp_lightning.pruning.file_calibration import FileCalibration

    return FileCalibration(source, data, samples=samples, revision=revision).layer_inputs()
