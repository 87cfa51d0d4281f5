"""``dpp inspect``: what a delta folder costs; or, of a base and a model fine-tuned from it, every layer's delta."""

from __future__ import annotations

import inspect
import json as json_text
import sys
from math import log
from typing import Any

from dpp_lightning.analysis.delta_cost import DeltaCost, TensorCost, inspect_delta
from dpp_lightning.analysis.pair_report import GAMMA, PairReport, inspect_pair
from dpp_lightning.cli.command import FunctionCommand, progress_bar
from dpp_lightning.experiments.terminal_tables import Column, show_lines, show_table
from dpp_lightning.methods.rescaling import keep_rate
from dpp_lightning.storage.source_kind import check_data_file, check_delta, check_model

_ORDER = "dpp inspect DELTA, or dpp inspect BASE FINETUNED"

_HINT = (
    "--calibration FILE (text, one example a line, or a .safetensors batch) adds the mean and variance of c = δ·x̄, the "
    "bounds on the output change, outlier features and massive activations"
)


def inspect_folders(
    delta_or_base: str,
    finetuned: str | None = None,
    *,
    json: bool = False,
    revision: str | None = None,
    calibration: str | None = None,
    calibration_samples: int = 64,
    pruning_rate: float = 0.9,
    labels: bool = False,
    can_retrain: bool = False,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
) -> None:
    """Show what a delta folder costs; or, of two models, every layer's delta and the method to take.

    With one argument: what a delta folder holds and what it costs, tensor by tensor. With two: the statistics of every
    layer's delta, the bounds on what DARE does to the outputs, and the recommended method with its reason.

    Args:
        delta_or_base: a delta folder or hub id; or, beside FINETUNED, the base: a folder in Hugging Face's layout, a
            .safetensors or .ckpt file, a sharded checkpoint, or a hub id
        finetuned: the model that was fine-tuned from the base
        json: one JSON object in place of the tables
        revision: branch, tag or commit where the delta is a hub id
        calibration: text (one example a line) or a .safetensors batch, for the layers' inputs
        calibration_samples: how many of its examples are used at most
        pruning_rate: p of the bounds, in [0, 1)
        labels: a labelled set is at hand, apart from what is scored
        can_retrain: the model may be fine-tuned again, with AdamR
        base_revision: branch, tag or commit where the base is a hub id
        finetuned_revision: likewise of the fine-tuned model
    """
    of_a_pair: dict[str, Any] = {
        "calibration": calibration,
        "calibration_samples": calibration_samples,
        "pruning_rate": pruning_rate,
        "labels": labels,
        "can_retrain": can_retrain,
        "base_revision": base_revision,
        "finetuned_revision": finetuned_revision,
    }
    if finetuned is None:
        _refuse_pair_options(of_a_pair)
        check_delta(delta_or_base, "DELTA", revision, order=_ORDER)
        cost = inspect_delta(delta_or_base, revision)
        _write(cost.to_json()) if json else _show_cost(cost)
        return
    if revision is not None:
        raise ValueError("--revision is of a delta; of a pair give --base_revision or --finetuned_revision")
    check_model(delta_or_base, "BASE", base_revision, order=_ORDER)
    check_model(finetuned, "FINETUNED", finetuned_revision, order=_ORDER, config=calibration is not None)
    check_data_file(calibration, "--calibration")
    with progress_bar("reading") as progress:
        report = inspect_pair(delta_or_base, finetuned, **of_a_pair, progress=progress)
    _write(report.to_json()) if json else _show_pair(report)


# the second line of a heading is the unit; δ and c have none
_COST_COLUMNS = (
    Column("tensor", text=True, names=True),
    Column("shape", text=True),
    Column("density\n%"),
    Column("rank"),
    *(Column(f"{name}\nbytes") for name in ("positions", "entropy", "values", "factors", "dense")),
)
_SIZE_COLUMNS = (
    Column("tensor", text=True, names=True),
    Column("shape"),
    Column("mean |δ|"),
    Column("max |δ|"),
    Column("share\n% of Σ|δ|"),
)
_INFLUENCE_COLUMNS = (
    Column("linear map", text=True, names=True),
    Column("inputs\nfeatures"),
    Column("mean |c|"),
    Column("mean c"),
    Column("var c"),
    Column("bound"),
    Column("outliers\nfeatures"),
    Column("massive\nfeatures"),
)

COMMAND = FunctionCommand(
    inspect_folders,
    example="dpp inspect BASE FINETUNED --calibration texts.txt",
    groups={"what is shown": "json", "with a delta": "revision", "with BASE FINETUNED": "calibration"},
)


def _refuse_pair_options(values: dict[str, Any]) -> None:
    """Refuse what belongs to a pair of models, where one delta is given.

    Raises:
        ValueError: with the options' names.
    """
    defaults = {name: p.default for name, p in inspect.signature(inspect_folders).parameters.items()}
    given = [f"--{name}" for name, value in values.items() if value != defaults[name]]
    if given:
        raise ValueError(
            f"{', '.join(given)}: of a pair of models; expected dpp inspect BASE FINETUNED, got one argument"
        )


def _write(values: dict[str, Any]) -> None:
    sys.stdout.write(json_text.dumps(values, indent=1) + "\n")


def _show_cost(cost: DeltaCost) -> None:
    """A table of the tensors, without the columns that are empty in this delta, and a summary."""
    rows = [_cells(row) for row in cost.tensors]
    used = [i for i in range(len(_COST_COLUMNS)) if i < 3 or any(row[i] for row in rows)]
    show_table([_COST_COLUMNS[i] for i in used], [[row[i] for i in used] for row in rows])
    factors = f", factors {cost.factors:,}" if cost.factors else ""
    sizes = f"positions {cost.positions:,}, values {cost.values:,}{factors}, carried {cost.carried:,}"
    seed = (
        "positions follow from the seed" if cost.coding == "seed" else "" if cost.entropy else "no positions are stored"
    )
    above = seed or f"positions {100 * cost.above_entropy:+.2f} % from their entropy of {cost.entropy:,.0f} bytes"
    show_lines([
        f"{cost.method}, p = {cost.pruning_rate:g}, seed {cost.seed}, q = {cost.q:.6g}, base {cost.base or 'unnamed'}",
        f"{cost.kept:,} numbers stored of {cost.entries:,} entries, density {100 * cost.density:.4g} %",
        f"{cost.total:,} bytes: {sizes}, config {cost.config:,}, table and heads {cost.overhead:,}",
        above,
        f"ratio {cost.ratio:.1f}: the model has {cost.dense_bytes:,} bytes in its own dtype",
        *([f"further files beside it: {cost.side_files:,} bytes"] if cost.side_files else []),
    ])  # fmt: skip


def _cells(row: TensorCost) -> tuple[str, ...]:
    counts = (row.positions, row.entropy, row.values, row.factors, row.carried)
    rank = "" if row.rank is None else str(row.rank)
    return (row.name, _shape(row.shape), f"{100 * row.density:.3g}", rank, *(f"{n:,.0f}" if n else "" for n in counts))


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _show_pair(report: PairReport) -> None:
    """A table of the layers, one of what is known by their inputs, a summary, and the recommendation."""
    sizes, influences = [], []
    for layer in report.layers:
        share = f"{100 * report.share(layer):.3g}"
        sizes.append((layer.name, _shape(layer.shape), f"{layer.magnitude:.3g}", f"{layer.largest:.3g}", share))
        if layer.influence is not None:
            c = layer.influence
            numbers = (c.magnitude, c.mean, c.variance, c.bound(report.pruning_rate, GAMMA)[0])
            counts = (str(len(features) or "") for features in (c.outliers, c.massive))
            influences.append(
                (layer.name.removesuffix(".weight"), str(c.features), *(f"{x:.3g}" for x in numbers), *counts)
            )
    show_table(_SIZE_COLUMNS, sizes)
    if influences:
        show_table(_INFLUENCE_COLUMNS, influences)
    show_lines(_summary(report, known=bool(influences)))


def _summary(report: PairReport, *, known: bool) -> list[str]:
    entries, p = sum(layer.numel for layer in report.layers), report.pruning_rate
    lines = [
        f"{report.base} to {report.finetuned}: {len(report.layers)} tensors with a delta of {entries:,} entries, "
        f"mean |δ| {report.mean_delta:.3g}, max |δ| {max((r.largest for r in report.layers), default=0.0):.3g}"
    ]
    for label, names in (("unchanged", report.unchanged), ("not in the base", report.carried)):
        if names:
            lines.append(f"{label}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}")
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
    few = f"for few bytes: {report.few_bytes.method}; {report.few_bytes.reason}"
    return [*lines, f"recommended: {first}{advice.method}; {advice.reason}", few]


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
