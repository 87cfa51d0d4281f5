"""Plots: every line is named, by a legend or at its end, without overlap and in colours that differ."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from dpp_lightning.experiments.grid import QCurve, Result
from dpp_lightning.experiments.line_labels import spread
from dpp_lightning.experiments.plots import COLOURS, figure_over_q, figure_over_rate, figure_over_size, save_figure

FIGURES = [figure_over_rate, figure_over_size]


def results(methods):
    made = [Result("base", 0.5, split="test"), Result("fine-tuned", 0.9, split="test")]
    for i, method in enumerate(methods):
        for rate in (0.5, 0.9, 0.99):
            score = 0.9 - 0.4 * rate**9 + 1e-4 * (i % 3)
            made += [Result(method, score + s / 100, rate, s, num_bytes=int(1e6 * (1 - rate)) + i) for s in (0, 1)]
    return made


def boxes(figure, texts):
    figure.canvas.draw()
    return [text.get_window_extent() for text in texts]


@pytest.mark.parametrize("figure_over", FIGURES)
@pytest.mark.parametrize("lines", [3, 6])
def test_up_to_six_lines_have_a_legend(figure_over, lines):
    names = [f"method-{i}" for i in range(lines - 2)]
    (axes,) = figure_over(results(names), score="acc").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*names, "fine-tuned", "base"]
    assert not axes.texts


@pytest.mark.parametrize("figure_over", FIGURES)
@pytest.mark.parametrize("lines", [7, 14, 40])
def test_more_lines_have_labels_at_their_ends_that_do_not_overlap(figure_over, lines):
    names = [f"method-{i}" for i in range(lines - 2)]
    figure = figure_over(results(names), score="acc")
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert sorted(text.get_text() for text in axes.texts) == sorted([*names, "fine-tuned", "base"])
    around = boxes(figure, axes.texts)
    assert not any(a.overlaps(b) for a, b in combinations(around, 2))
    plot, whole = axes.get_window_extent(), figure.bbox
    assert all(box.x0 > plot.x1 and box.x1 < whole.x1 and whole.y0 < box.y0 and box.y1 < whole.y1 for box in around)


def test_labels_stand_in_the_order_of_the_ends():
    figure = figure_over_rate(results("abcdef"), score="acc")
    ends = {r.method: r.score for r in results("abcdef") if r.pruning_rate in (None, 0.99)}
    heights = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    ordered = sorted(heights, key=heights.__getitem__)
    assert [ends[name] for name in ordered] == sorted(ends.values())


def test_a_method_without_a_finite_score_is_labelled_all_the_same(tmp_path):
    made = [*results("abcdef"), Result("diverged", float("nan"), 0.9, 0, num_bytes=10)]
    figure = figure_over_rate(made, score="acc")
    assert "diverged" in [text.get_text() for text in figure.axes[0].texts]
    assert save_figure(figure, tmp_path / "a.png").stat().st_size > 1000


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.05))
def test_spread_positions_keep_their_distance_order_and_range(positions, step):
    moved = spread(positions, step)
    order = np.argsort(positions, kind="stable")
    assert all(np.diff(np.asarray(moved)[order]) >= step - 1e-9)
    assert min(moved) >= -1e-9
    assert max(moved) <= 1 + 1e-9


def test_positions_that_are_far_apart_stay():
    assert spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


def test_a_curve_over_q_names_all_of_its_lines(tmp_path):
    curve = QCurve(0.9, [0.1, 0.3, 1.0], [0.5, 0.8, 0.6], [2.0, 1.0, 3.0], 0.3)
    figure = figure_over_q([curve], monitor="_acc$x$", finetuned=0.9, base=0.4)
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "_acc$x$", "fine-tuned", "base", "output change", "chosen q = 0.3",
    ]  # fmt: skip
    colours = [handle.get_color() for handle in legend.legend_handles]
    assert colours == ["tab:blue"] * 3 + ["tab:red", "black"]
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(drawn) == 5
    save_figure(figure, tmp_path / "q.png")


def test_names_are_no_formulas_and_none_is_hidden(tmp_path):
    figure = figure_over_rate(results(["_a", r"$\frac$", "$x^$"]), score="acc$_$", title="$^$")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()][:3] == ["_a", r"$\frac$", "$x^$"]
    save_figure(figure, tmp_path / "a.png")  # a formula that is none would raise


def test_many_rates_stand_in_rows_of_panels():
    curves = [QCurve(0.9, [0.1, 1.0], [0.5, 0.8], [2.0, 1.0]) for _ in range(9)]
    width, height = figure_over_q(curves, monitor="acc").get_size_inches()
    assert width < 25
    assert height > 10


def lab(colour):
    """CIELAB coordinates of an sRGB colour (D65)."""
    linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
    )
    x, y, z = (np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in matrix @ linear / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_differ_from_each_other_and_from_paper():
    assert len(set(COLOURS)) == 14
    assert min(np.linalg.norm(lab(a) - lab(b)) for a, b in combinations([*COLOURS, "white", "black"], 2)) >= 24
