"""Tables and plots of an experiment's results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console

from dpp_lightning.experiments.grid import Result, mean_and_deviation
from dpp_lightning.experiments.terminal_tables import Column, show_table
from dpp_lightning.storage.safe_text import markdown_text

COLUMNS = ("model", "p", "score", "q", "density", "MB", "ratio", "seconds")


@dataclass(frozen=True)
class Summary:
    """One method at one rate: means over the mask seeds.

    Attributes:
        model: name of the method, or ``base`` / ``fine-tuned``.
        pruning_rate: fraction dropped, in [0, 1); None for base and fine-tuned.
        score, deviation: mean and sample deviation of the metric; the deviation of one seed is 0.
        seeds: how many rows there are.
        lowest_q, highest_q: of the seeds; None for base and fine-tuned.
        density: stored over all entries, in [0, 1].
        megabytes: 10**6 true bytes.
        ratio: dense bytes over these; None for the base.
        seconds: of one row.
    """

    model: str
    pruning_rate: float | None
    score: float
    deviation: float
    seeds: int
    lowest_q: float | None
    highest_q: float | None
    density: float
    megabytes: float
    ratio: float | None
    seconds: float


def summaries(results: Iterable[Result]) -> list[Summary]:
    """One for each method, in order of appearance, and rate."""
    groups: dict[tuple[str, float | None], list[Result]] = {}
    for result in results:
        groups.setdefault((result.method, result.pruning_rate), []).append(result)
    order = {method: index for index, method in enumerate(dict.fromkeys(method for method, _ in groups))}
    rows = sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1] or 0.0))
    return [_summary(method, rate, group) for (method, rate), group in rows]


def _summary(method: str, rate: float | None, group: Sequence[Result]) -> Summary:
    qs = [r.q for r in group if r.q is not None]
    return Summary(
        method,
        rate,
        *mean_and_deviation([r.score for r in group]),
        len(group),
        min(qs, default=None),
        max(qs, default=None),
        fmean(r.density for r in group),
        fmean(r.num_bytes for r in group) / 1e6,
        fmean(r.ratio or 0.0 for r in group) if group[0].ratio else None,
        fmean(r.seconds for r in group),
    )


def summary_rows(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """The summaries as text, under the headings of the table."""
    return [_row(summary) for summary in summaries(results)]


def _row(row: Summary) -> tuple[str, ...]:
    q = "" if row.lowest_q is None else f"{row.lowest_q:.4g}"
    return (
        row.model,
        "" if row.pruning_rate is None else f"{row.pruning_rate:g}",
        f"{row.score:.4f}" + (f" ± {row.deviation:.4f}" if row.seeds > 1 else ""),
        q + (f" … {row.highest_q:.4g}" if row.highest_q != row.lowest_q else ""),
        f"{100 * row.density:.3g} %",
        f"{row.megabytes:.3f}",
        "" if row.ratio is None else f"{row.ratio:.1f}",
        seconds_text(row.seconds),
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
    columns = [Column(heading, text=heading == "model", names=heading == "model") for heading in COLUMNS]
    show_table(columns, summary_rows(results), console, title="Pruned deltas", caption=table_caption(results, monitor))


def table_caption(results: Sequence[Result], monitor: str) -> str:
    """What the scores are, how many seeds they are of, and the data that q was found on."""
    pruned = [r for r in results if r.pruning_rate is not None]
    searched = next((r.q_split for r in pruned if r.q_split), "")
    seeds = len({r.seed for r in pruned})
    caption = f"score: {monitor} on {results[0].split}"
    caption += f", mean ± deviation over {seeds} mask seeds" if seeds > 1 else ""
    caption += f"; q found on {searched}" if searched else ""
    return "; ".join(filter(None, [caption, seconds_caption(results)]))


def seconds_caption(results: Iterable[Result]) -> str:
    """What the pruned rows took and what it went into; empty where nothing was pruned."""
    pruned = [r for r in results if r.pruning_rate is not None]
    prune, score = sum(r.prune_seconds for r in pruned), sum(r.score_seconds for r in pruned)
    all_of_it = sum(r.seconds for r in pruned)
    if not prune + score:  # rows of an earlier version
        return ""
    return (
        f"{seconds_text(all_of_it)} s for {len(pruned)} pruned models: draw, search and train "
        f"{prune / all_of_it:.0%}, score {score / all_of_it:.0%}, save {1 - (prune + score) / all_of_it:.0%}"
    )


def markdown_table(results: Iterable[Result]) -> str:
    """The summary as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return (
        "\n".join([*lines, *("| " + " | ".join(map(markdown_text, row)) + " |" for row in summary_rows(results))])
        + "\n"
    )
