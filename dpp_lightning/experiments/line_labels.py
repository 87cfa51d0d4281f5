"""Names of the lines of a plot: a legend for a few, and for more of them labels at their ends that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

LEGEND_LINES = 6  # more lines than these are not told apart by a legend
LABEL_INCHES = 0.17  # height of a label with the space around it


def name_lines(axes: Any, lines: Sequence[tuple[str, Any]], height: float) -> None:
    """Name lines by a legend beside the axes, or where they are more than six, each at its end.

    The scales and limits of the axes must be final.

    Args:
        axes: of matplotlib.
        lines: label and line (``Line2D``) of each.
        height: of the axes, at least, in inches.
    """
    if len(lines) <= LEGEND_LINES:
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        axes.legend([line for _, line in lines], [label for label, _ in lines], fontsize="small", **place)
        return
    ends = [end_of(axes, line) for _, line in lines]
    heights = spread([y for _, y in ends], LABEL_INCHES / height)
    for (label, line), end, y in zip(lines, ends, heights, strict=True):
        _label_end(axes, label, line, end, y)


def end_of(axes: Any, line: Any) -> tuple[float, float]:
    """The rightmost finite point of a line in fractions of the axes; the lower right corner where it has none."""
    axes.get_xlim(), axes.get_ylim()  # these settle limits that follow from the data
    points = axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))
    finite = points[np.isfinite(points).all(axis=1)]
    if not len(finite):
        return 1.0, 0.0
    x, y = finite[finite[:, 0].argmax()]
    return float(x), float(y)


def spread(positions: Sequence[float], step: float) -> list[float]:
    """Move positions apart with the least change (of squares), keeping their order.

    Args:
        positions: in [0, 1].
        step: the least distance of two of them afterwards.

    Returns:
        Positions in [0, 1], unless there are too many for it.
    """
    order, steps = np.argsort(positions, kind="stable"), step * np.arange(len(positions))
    fitted = isotonic_regression(np.asarray(positions, dtype=float)[order] - steps).x
    moved = np.empty(len(positions))
    moved[order] = np.clip(fitted, 0.0, max(1.0 - step * (len(positions) - 1), 0.0)) + steps
    return [float(y) for y in moved]


def _label_end(axes: Any, label: str, line: Any, end: tuple[float, float], y: float) -> None:
    """A sample of the line and its label right of the axes, and a thin line from there to its end."""
    style = {"color": line.get_color(), "transform": axes.transAxes, "clip_on": False, "zorder": 1}
    axes.plot([end[0], 1.03], [end[1], y], linewidth=0.6, alpha=0.6, scalex=False, scaley=False, **style)
    axes.plot(
        [1.03, 1.05, 1.07],
        [y, y, y],
        linestyle=line.get_linestyle(),
        linewidth=line.get_linewidth(),
        marker=line.get_marker(),
        markersize=line.get_markersize(),
        markevery=[1],
        scalex=False,
        scaley=False,
        **style,
    )
    axes.text(1.08, y, label, transform=axes.transAxes, fontsize="small", verticalalignment="center", parse_math=False)
