"""Plots of a sweep: the score of every method over the pruning rate and over the true size of the delta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpp_lightning.experiments.grid import QCurve, Result, mean_and_deviation
from dpp_lightning.experiments.line_labels import LABEL_INCHES, name_lines
from dpp_lightning.storage.atomic_write import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the first six are those of Okabe and Ito, which colour-blind people tell apart; all differ by a CIELAB distance of 24
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#0000ff",
    "#692d0f", "#8b0057", "#7cb518", "#a56eff", "#5a0096", "#c3b469", "#7f7f7f",
)  # fmt: skip
_MARKERS = "osD^v<>PX*hpd8"
_STYLES = ("-", "--", ":")  # of the first, second and third round through the colours
_LEVELS = ("--", ":", "-.")
_HEIGHT, _AROUND = 5.4, 1.2  # inches of a plot of scores, and of what is above and below its axes
_PANELS = 4  # of a row of curves over q


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
    """Plot :func:`figure_over_rate` into a file.

    Args:
        results: base, fine-tuned and pruned rows.
        path: PNG or PDF; appears whole or not at all.
        score: label of the score, with its split.
        title: above the plot.
    """
    return save_figure(figure_over_rate(results, score=score, title=title), path)


def plot_over_size(results: Sequence[Result], path: Path, *, score: str, title: str = "") -> Path:
    """Plot :func:`figure_over_size` into a file; arguments as :func:`plot_over_rate`."""
    return save_figure(figure_over_size(results, score=score, title=title), path)


def plot_over_q(
    curves: Sequence[QCurve], path: Path, *, monitor: str, finetuned: float | None = None, base: float | None = None
) -> Path:
    """Plot :func:`figure_over_q` into a file.

    Args:
        curves: one per rate.
        path: PNG or PDF; appears whole or not at all.
        monitor: name of the score.
        finetuned, base: levels drawn as lines.
    """
    return save_figure(figure_over_q(curves, monitor=monitor, finetuned=finetuned, base=base), path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def figure_over_rate(results: Sequence[Result], *, score: str, title: str = "") -> Figure:
    """The score over the pruning rate; the axis is logarithmic in 1 - p, so that 0.9, 0.99, 0.999 lie evenly."""

    rates = {r.pruning_rate for r in results if r.pruning_rate is not None}
    return _figure(results, lambda point: 1 - point.rate, lambda axes: _label_rates(axes, rates), score, title)


def figure_over_size(results: Sequence[Result], *, score: str, title: str = "") -> Figure:
    """The score over the bytes of the delta's files."""

    def label(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB of the delta's files")

    return _figure(results, lambda point: point.megabytes, label, score, title)


def _figure(
    results: Sequence[Result],
    abscissa: Callable[[Point], float],
    label: Callable[[Any], None],
    score: str,
    title: str,
) -> Figure:
    lines = {
        method: [(abscissa(point), point.score, point.deviation) for point in line]
        for method, line in points(results).items()
    }
    levels = [(name, r.score) for name in ("fine-tuned", "base") for r in results if r.method == name]
    return _lines_figure(lines, levels, label, score, title)


def figure_of_lines(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    levels: Sequence[tuple[str, float]],
    *,
    over: str,
    score: str,
    title: str = "",
) -> Figure:
    """Lines with deviations over a number that is no method's, such as a decay.

    Args:
        lines: abscissa, score and deviation of every point, by the line's name. If an abscissa is 0 or less the axis
            is linear, else logarithmic.
        levels: names and scores, drawn as horizontal lines.
        over: label of the abscissa; ``rate`` is a pruning rate, whose axis is logarithmic in what is kept.
        score: label of the score.
        title: above the plot.
    """
    if over == "rate":
        rates = {x for line in lines.values() for x, _, _ in line}
        kept = {name: [(1 - x, y, deviation) for x, y, deviation in line] for name, line in lines.items()}
        return _lines_figure(kept, levels, lambda axes: _label_rates(axes, rates), score, title)

    def label(axes: Any) -> None:
        axes.set_xlabel(over, parse_math=False)
        if any(x <= 0 for line in lines.values() for x, _, _ in line):
            axes.set_xscale("linear")

    return _lines_figure(lines, levels, label, score, title)


def _label_rates(axes: Any, rates: Iterable[float]) -> None:
    """Name the pruning rates on an axis of what is kept."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ordered = sorted(rates)
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(FixedLocator([1 - rate for rate in ordered]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{rate:g}" for rate in ordered])
    axes.set_xlabel("pruning rate p")


def _lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    levels: Sequence[tuple[str, float]],
    label: Callable[[Any], None],
    score: str,
    title: str,
) -> Figure:
    height = max(_HEIGHT, _AROUND + LABEL_INCHES * (len(lines) + 2))
    figure = _new_figure(9, height)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    named: list[tuple[str, Any]] = []
    for index, (name, line) in enumerate(lines.items()):
        drawn = axes.errorbar(
            [x for x, _, _ in line],
            [y for _, y, _ in line],
            [deviation for _, _, deviation in line],
            color=COLOURS[index % len(COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_STYLES[index // len(COLOURS) % len(_STYLES)],
            markersize=6,
            linewidth=1.2,
            capsize=3,
        )
        named.append((name, drawn[0]))
    for index, (name, level) in enumerate(levels):
        style = _LEVELS[index % len(_LEVELS)]
        named.append((name, axes.axhline(level, color="black", linestyle=style, linewidth=1)))
    label(axes)
    axes.set_ylabel(score, parse_math=False)
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.25)
    name_lines(axes, named, height - _AROUND)
    return _without_formulas(figure)


def figure_over_q(
    curves: Sequence[QCurve], *, monitor: str, finetuned: float | None = None, base: float | None = None
) -> Figure:
    """Score and output change over q, one panel a rate (DARE the Extreme, Fig. 1), four panels a row.

    Args:
        curves: one per rate.
        monitor: name of the score.
        finetuned, base: levels drawn as lines.
    """
    columns = min(len(curves), _PANELS)
    rows = -(-len(curves) // columns)
    figure = _new_figure(5.2 * columns, 4.6 * rows)
    for index, curve in enumerate(curves):
        _draw_curve(figure.add_subplot(rows, columns, index + 1), curve, monitor, finetuned, base)
    return _without_formulas(figure)


def _draw_curve(axes: Any, curve: QCurve, monitor: str, finetuned: float | None, base: float | None) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    lines = [(monitor, axes.plot(curve.q, curve.score, "o-", color="tab:blue")[0])]
    for level, style, name in ((finetuned, "--", "fine-tuned"), (base, ":", "base")):
        if level is not None:
            lines.append((name, axes.axhline(level, color="tab:blue", linestyle=style, linewidth=1)))
    change_axes = axes.twinx()
    lines.append(("output change", change_axes.plot(curve.q, curve.change, "s-", color="tab:red")[0]))
    if curve.chosen is not None:
        lines.append((f"chosen q = {curve.chosen:.3g}", axes.axvline(curve.chosen, color="black", linewidth=1)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("q (left end: 1 - p, DARE)")
    axes.set_ylabel(monitor, color="tab:blue", parse_math=False)
    change_axes.set_ylabel("output change", color="tab:red")
    axes.set_title(f"p = {curve.pruning_rate:g}")
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend([line for _, line in lines], [label for label, _ in lines], ncol=2, fontsize="small", **place)


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _without_formulas(figure: Figure) -> Figure:
    """The figure with its texts shown as they are: a name with two dollar signs is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure
