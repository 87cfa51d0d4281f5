"""dpp inspect BASE FINETUNED: the statistics of every layer's delta, the bounds on what DARE does, and what to take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpp_lightning.analysis.layer_statistics import LayerStatistics, layer_statistics, mean_magnitude
from dpp_lightning.analysis.theory import Recommendation, berend_kontorovich, hoeffding, kearns_saul, recommend
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.rescaling import keep_rate
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import has_own_names, load_tensors, total_bytes

GAMMA = 0.95
_RATE, _SAMPLES = 0.9, 64
_FACTORS = {"hoeffding": hoeffding, "kearns_saul": kearns_saul, "berend_kontorovich": berend_kontorovich}
_HINT = (
    "--calibration FILE (text, one example a line, or a .safetensors batch) adds the mean and variance of c = δ·x̄, the "
    "bounds on the output change, outlier features and massive activations"
)


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
    """

    base: str
    finetuned: str
    pruning_rate: float
    layers: tuple[LayerStatistics, ...]
    unchanged: tuple[str, ...]
    carried: tuple[str, ...]
    factors: dict[str, float]
    recommendation: Recommendation

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


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a pair; all are None or False where they are not given."""
    pair = parser.add_argument_group("with BASE FINETUNED")
    pair.add_argument("--calibration", metavar="FILE", help="text (one example a line) or a .safetensors batch")
    pair.add_argument("--calibration-samples", type=int, metavar="N", help=f"examples at most (default: {_SAMPLES})")
    pair.add_argument(
        "--pruning_rate", "--pruning-rate", type=float, metavar="P", help=f"p of the bounds (default: {_RATE})"
    )
    pair.add_argument("--labels", action="store_true", help="a labelled set is at hand, apart from what is scored")
    pair.add_argument("--can-retrain", action="store_true", help="the model may be fine-tuned again, with AdamR")
    pair.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a hub id")
    pair.add_argument("--finetuned-revision", metavar="REV", help="likewise")


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that belong to the other use of the command.

    Raises:
        ValueError: with their names.
    """
    pair = ["calibration", "calibration_samples", "pruning_rate", "labels", "can_retrain"]
    pair += ["base_revision", "finetuned_revision"]
    given = [name for name in pair if getattr(options, name) not in (None, False)]
    if options.finetuned is None and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names}: of a pair of models; expected dpp inspect BASE FINETUNED, got one argument")
    if options.finetuned is not None and options.revision is not None:
        raise ValueError("--revision is of a delta; of a pair give --base-revision or --finetuned-revision")


def from_options(options: argparse.Namespace, progress: Callable[[int, int], Any] | None = None) -> PairReport:
    """:func:`inspect_pair` as the command line asks for it; the base is ``options.delta``."""
    return inspect_pair(
        options.delta,
        options.finetuned,
        _RATE if options.pruning_rate is None else options.pruning_rate,
        calibration=options.calibration,
        samples=_SAMPLES if options.calibration_samples is None else options.calibration_samples,
        labels=options.labels,
        can_retrain=options.can_retrain,
        base_revision=options.base_revision,
        finetuned_revision=options.finetuned_revision,
        progress=progress,
    )


def inspect_pair(
    base: str,
    finetuned: str,
    pruning_rate: float = _RATE,
    *,
    calibration: str | None = None,
    samples: int = _SAMPLES,
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
        calibration, samples: as in :class:`dpp_lightning.pruning.file_calibration.FileCalibration`; None leaves the
        inputs out.
        labels, can_retrain: as in :func:`dpp_lightning.analysis.theory.recommend`.
        base_revision, finetuned_revision: of hub ids.
        progress: told the bytes of both models that are done, and all of them.

    Raises:
        ValueError: a rate outside, models that do not match, weights that are not finite, or a calibration file that
            does not fit the model.
        FileNotFoundError: no such model or calibration file.
    """
    kept = keep_rate(pruning_rate)
    factors = {name: f(pruning_rate) for name, f in _FACTORS.items() if f is not berend_kontorovich or kept <= 0.5}
    ours, theirs = load_tensors(finetuned, finetuned_revision), load_tensors(base, base_revision)
    plan = PruningPlan.of(theirs, ours, Scope(), files=has_own_names(finetuned))
    if calibration is not None:
        plan = plan.with_inputs(_inputs(finetuned, finetuned_revision, calibration, samples))
    sizes = [total_bytes({"base": pair.base, "finetuned": pair.finetuned}) for pair in plan.pairs]
    layers = []
    for place, pair in enumerate(plan.pairs, 1):
        layers.append(layer_statistics(pair))
        if progress:
            progress(sum(sizes[:place]), sum(sizes))
    advice = recommend(mean_magnitude(layers), labels=labels, can_retrain=can_retrain, inputs=calibration is not None)
    unchanged, carried = tuple(sorted(plan.unchanged)), tuple(plan.carried)
    return PairReport(base, finetuned, pruning_rate, tuple(layers), unchanged, carried, factors, advice)


def show(report: PairReport, console: Console) -> None:
    """A table of the layers, one of what is known by their inputs, a summary, and the recommendation."""
    sizes = _table("tensor", "shape", "mean |δ|", "max |δ|", "share")
    influences = _table("linear map", "inputs", "mean |c|", "mean c", "var c", "bound", "outliers", "massive")
    for layer in report.layers:
        share = f"{100 * report.share(layer):.3g} %"
        shape = "×".join(map(str, layer.shape)) or "scalar"
        sizes.add_row(layer.name, shape, f"{layer.magnitude:.3g}", f"{layer.largest:.3g}", share)
        if layer.influence is not None:
            c = layer.influence
            numbers = (c.magnitude, c.mean, c.variance, c.bound(report.pruning_rate, GAMMA)[0])
            counts = (str(len(found) or "") for found in (c.outliers, c.massive))
            influences.add_row(
                layer.name.removesuffix(".weight"), str(c.features), *(f"{x:.3g}" for x in numbers), *counts
            )
    console.print(sizes)
    if influences.rows:
        console.print(influences)
    for line in _summary(report, known=bool(influences.rows)):
        console.print(line, highlight=False, markup=False)


def _table(name: str, *numbers: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(name, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _summary(report: PairReport, *, known: bool) -> list[str]:
    entries, p = sum(layer.numel for layer in report.layers), report.pruning_rate
    lines = [
        f"{report.base} to {report.finetuned}: {len(report.layers)} tensors with a delta of {entries:,} entries, "
        f"mean |δ| {report.mean_delta:.3g}, max |δ| {max((r.largest for r in report.layers), default=0.0):.3g}"
    ]
    for what, names in (("unchanged", report.unchanged), ("not in the base", report.carried)):
        if names:
            lines.append(f"{what}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}")
    bounds = f"Hoeffding {report.factors['hoeffding']:.3g}, Kearns-Saul {report.factors['kearns_saul']:.3g}"
    lines.append(f"factors at p = {p:g}: {bounds}{_scaling(report)}")
    if known:
        lines.append(
            f"bound: DARE moves an output by less with probability {GAMMA:g} (Kearns-Saul; mean over the outputs); "
            "c = δ·x̄, its mean and variance over the inputs"
        )
    else:
        lines.append(_HINT)
    advice = report.recommendation
    first = f"{advice.optimizer}, then " if advice.optimizer else ""
    return [*lines, f"recommended: {first}{advice.method}; {advice.reason}"]


def _scaling(report: PairReport) -> str:
    if "berend_kontorovich" not in report.factors:
        return ""
    factor = report.factors["berend_kontorovich"]
    kept = [keep_rate(report.pruning_rate) * r.influence.features for r in report.layers if r.influence]
    least = f"; the least here is {min(kept):.3g}" if kept else ""
    return (
        f"; Berend-Kontorovich {factor:.3g}, no guarantee but the scaling where n (1 - p) is far above "
        f"{log(2 / (1 - GAMMA)):.2g}{least}"
    )


def _inputs(source: str, revision: str | None, data: str, samples: int) -> dict[str, InputStatistics]:
    from dpp_lightning.pruning.file_calibration import FileCalibration

    if Path(source).is_file():
        raise ValueError(
            f"{source} is a file of weights: --calibration runs the fine-tuned model, so it must be a folder or hub id "
            "with its config.json"
        )
    try:
        return FileCalibration(source, data, samples=samples, revision=revision).layer_inputs()
    except (TypeError, IndexError, RuntimeError) as error:  # from inside the model
        raise ValueError(f"{data} does not hold the inputs of {source}: {error}") from None
