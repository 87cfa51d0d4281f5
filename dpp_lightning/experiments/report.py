"""What a sweep leaves beside its rows: the Markdown table with its caption, and the plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.plots import plot_over_rate, plot_over_size
from dpp_lightning.experiments.tables import markdown_table, seconds_caption
from dpp_lightning.storage.atomic_write import atomic_file
from dpp_lightning.storage.safe_text import markdown_text

TABLE_FILE, RATE_FILE, SIZE_FILE = "table.md", "score_over_rate.png", "score_over_mb.png"


@dataclass(frozen=True)
class Subject:
    """What was swept.

    Attributes:
        task: name of the task or of the module.
        checkpoint: the fine-tuned weights.
        monitor: name of the score.
        objective: what the search of q went by.
    """

    task: str
    checkpoint: str
    monitor: str
    objective: str


def write_report(results: Sequence[Result], folder: Path, subject: Subject) -> list[Path]:
    """Write ``table.md`` and both plots into ``folder``; returns their paths.

    Raises:
        OSError: they cannot be written.
    """
    table = folder / TABLE_FILE
    with atomic_file(table) as temporary:
        heading = f"# {markdown_text(f'{subject.task}, {Path(subject.checkpoint).name}')}\n\n"
        temporary.write_text(heading + markdown_table(results) + "\n" + caption(results, subject), encoding="utf-8")
    score = f"{subject.monitor} ({results[0].split} split)"
    title = f"{subject.task}, {Path(subject.checkpoint).name}; {_seeds(results)}"
    return [
        table,
        plot_over_rate(results, folder / RATE_FILE, score=score, title=title),
        plot_over_size(results, folder / SIZE_FILE, score=score, title=title),
    ]


def caption(results: Sequence[Result], subject: Subject) -> str:
    """The split of every number, the seeds, the units, the checkpoint: a list in Markdown."""
    searched = sorted({r.q_split for r in results if r.q_split})
    labels = "by the metric on labels" if subject.objective == "metric" else "by the change of the output, no labels"
    calibrated = (
        f"on {' and '.join(searched)}, {labels}; none of it is scored" if searched else "none; q follows from p"
    )
    return "".join(
        f"- {markdown_text(line)}\n"
        for line in (
            f"score: {subject.monitor} on the {results[0].split} split; {_seeds(results)}",
            f"calibration and search of q: {calibrated}",
            "base: all of the delta dropped (new heads kept); fine-tuned: nothing dropped",
            "MB: 10⁶ bytes of the delta's two files (fine-tuned: the dense weights); ratio: dense bytes over these; "
            "density: stored over all entries; seconds: prune, search, score and save one row",
            seconds_caption(results),
            f"task {subject.task}, checkpoint {subject.checkpoint}",
        )
        if line
    )


def _seeds(results: Sequence[Result]) -> str:
    seeds = {r.seed for r in results if r.seed is not None}
    if len(seeds) < 2:
        return "one mask seed"
    return f"mean ± sample deviation over {len(seeds)} mask seeds (one for methods that draw nothing)"
