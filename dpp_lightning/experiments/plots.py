"""Plots of a sweep: the score of every method over the pruning rate and over the true size of the delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dpp_lightning.experiments.grid import QCurve, Result, mean_and_deviation
from dpp_lightning.storage.atomic_write import atomic_file

_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22", "#17becf", "#000080", "#c0a000", "#00c080", "#ff40ff",
)  # fmt: skip
_MARKERS = "osD^v<>PX*hpd8"


@dataclass(frozen=True)
class Point:
    """One method at one rate: mean and sample deviation of the score over seeds, mean size in 10**6 bytes."""

    rate: float
    megabytes: float
    score: float
    deviation: float


def points(results: Sequence[Result]) -> dict[str, list[Point]]:
    """Every method's points, in the order of the rates."""
    groups: dict[str, dict[float, list[Result]]] = {}
    for result in results:
        if result.pruning_rate is not None:
            groups.setdefault(result.method, {}).setdefault(result.pruning_rate, []).append(result)
    return {
        method: [
            Point(rate, fmean(r.num_bytes for r in rows) / 1e6, *mean_and_deviation([r.score for r in rows]))
            for rate, rows in sorted(by_rate.items())
        ]
        for method, by_rate in groups.items()
    }


def plot_over_rate(results: Sequence[Result], path: Path, *, score: str, title: str = "") -> Path:
    """Plot the score over the pruning rate; the axis is logarithmic in 1 - p, so that 0.9, 0.99, 0.999 lie evenly.

    Args:
        results: base, fine-tuned and pruned rows.
        path: PNG or PDF; appears whole or not at all.
        score: label of the score, with its split.
        title: above the plot.
    """

    def label(axes: Any) -> None:
        from matplotlib.ticker import FixedLocator, NullLocator

        rates = sorted({r.pruning_rate for r in results if r.pruning_rate is not None})
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(FixedLocator([1 - rate for rate in rates]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{rate:g}" for rate in rates])
        axes.set_xlabel("pruning rate p")

    return _plot(results, path, lambda point: 1 - point.rate, label, score, title)


def plot_over_size(results: Sequence[Result], path: Path, *, score: str, title: str = "") -> Path:
    """Plot the score over the bytes of the delta's files; arguments as :func:`plot_over_rate`."""

    def label(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB of the delta's files")

    return _plot(results, path, lambda point: point.megabytes, label, score, title)


def _plot(
    results: Sequence[Result],
    path: Path,
    abscissa: Callable[[Point], float],
    label: Callable[[Any], None],
    score: str,
    title: str,
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for index, (method, line) in enumerate(points(results).items()):
        axes.errorbar(
            [abscissa(point) for point in line],
            [point.score for point in line],
            [point.deviation for point in line],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6,
            linewidth=1.2,
            capsize=3,
            label=method,
        )
    for name, style in (("fine-tuned", "--"), ("base", ":")):
        for level in (r.score for r in results if r.method == name):
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=name)
    label(axes)
    axes.set_ylabel(score)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def plot_over_q(
    curves: Sequence[QCurve], path: Path, *, monitor: str, finetuned: float | None = None, base: float | None = None
) -> Path:
    """Plot score and output change over q, one panel a rate (DARE the Extreme, Fig. 1).

    Args:
        curves: one per rate.
        path: PNG or PDF; appears whole or not at all.
        monitor: name of the score.
        finetuned, base: levels drawn as lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(5.2 * len(curves), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), index + 1)
        axes.plot(curve.q, curve.score, "o-", color="tab:blue", label=monitor)
        for level, style, name in ((finetuned, "--", "fine-tuned"), (base, ":", "base")):
            if level is not None:
                axes.axhline(level, color="tab:blue", linestyle=style, linewidth=1, label=name)
        change_axes = axes.twinx()
        change_axes.plot(curve.q, curve.change, "s-", color="tab:red", label="output change")
        if curve.chosen is not None:
            axes.axvline(curve.chosen, color="black", linewidth=1, label=f"chosen q = {curve.chosen:.3g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("q (left end: 1 - p, DARE)")
        axes.set_ylabel(monitor, color="tab:blue")
        change_axes.set_ylabel("output change", color="tab:red")
        axes.set_title(f"p = {curve.pruning_rate:g}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize="small")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path
