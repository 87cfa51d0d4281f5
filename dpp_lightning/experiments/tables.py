"""Tables and plots of an experiment's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dpp_lightning.experiments.grid import Result, mean_and_deviation

_COLUMNS = ("model", "p", "score", "q", "density", "MB", "ratio", "seconds")


def summary_rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """One row per method, in order of appearance, and rate: mean and sample deviation over mask seeds; MB are 10**6
    true bytes."""
    groups: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.pruning_rate), []).append(result)
    order = {method: index for index, method in enumerate(dict.fromkeys(method for method, _ in groups))}
    rows = sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0.0))
    return [_row(method, rate, group) for (method, rate), group in rows]


def _row(method: str, rate: float | None, group: list[Result]) -> tuple[str, ...]:
    first = group[0]
    mean, deviation = mean_and_deviation([r.score for r in group])
    size, _ = mean_and_deviation([float(r.num_bytes) for r in group])
    density, _ = mean_and_deviation([r.density for r in group])
    ratio, _ = mean_and_deviation([r.ratio or 0.0 for r in group])
    seconds, _ = mean_and_deviation([r.seconds for r in group])
    qs = sorted({r.q for r in group if r.q is not None})
    return (
        method,
        "" if rate is None else f"{rate:g}",
        f"{mean:.4f}" + (f" ± {deviation:.4f}" if len(group) > 1 else ""),
        "" if not qs else f"{qs[0]:.4g}" + (f" … {qs[-1]:.4g}" if len(qs) > 1 else ""),
        f"{100 * density:.3g} %",
        f"{size / 1e6:.3f}",
        f"{ratio:.1f}" if first.ratio else "",
        seconds_text(seconds),
    )


def seconds_text(seconds: float) -> str:
    """A duration in seconds, to the tenth, or to the thousandth where it is under a second."""
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.3f}"


def console_table(results: Sequence[Result], monitor: str, console: Console | None = None) -> None:
    """Show the summary on the console.

    Args:
        results: base, fine-tuned and pruned rows.
        monitor: name of the score.
        console: where to; default the standard output.
    """
    pruned = [r for r in results if r.pruning_rate is not None]
    searched = next((r.q_split for r in pruned if r.q_split), "")
    seeds = len({r.seed for r in pruned})
    caption = f"score: {monitor} on {results[0].split}"
    caption += f", mean ± deviation over {seeds} mask seeds" if seeds > 1 else ""
    caption += f"; q found on {searched}" if searched else ""
    table = Table(title="Pruned deltas", caption=caption, box=SIMPLE_HEAD, padding=0)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in summary_rows(results):
        table.add_row(*row)
    (console or Console()).print(table)


def markdown_table(results: Iterable[Result]) -> str:
    """The summary as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in summary_rows(results))]) + "\n"
