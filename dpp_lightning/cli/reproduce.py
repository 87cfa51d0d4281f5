"""``dpp reproduce``: a table or figure of the papers, trained, pruned and scored, beside the published numbers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.command import FunctionCommand, say
from dpp_lightning.experiments.paper_table import Cell, PaperTable, Sources, Training, read_table, stand_ins

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def reproduce(
    table: str | None = None,
    *,
    base: Sequence[str] = (),
    data: Sequence[str] = (),
    scale: Literal["paper", "small"] = "paper",
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    training_seeds: Sequence[int] = (),
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] | None = None,
    output: str = "runs/papers",
    download: bool = False,
    dry_run: bool = False,
) -> None:
    """Repeat a table or figure of the papers and write what was measured beside what was published.

    Without a name the tables are listed; a file with a table of your own is taken too. Every training, sweep and merge
    that a table needs is a command of dpp; they lie in the output folder, where other tables find them. Killed, the
    same command goes on where it was, and given several times, on machines that see the folder, it shares the work.

    Args:
        table: its name, such as darex-table2, or a YAML file
        base: folders or hub ids that stand for the paper's models: NAME=FOLDER for one of them, FOLDER for all
        data: folders or files that stand for the paper's data: NAME=FOLDER for one of them, FOLDER for all
        scale: paper, or small for what two CPU cores do with a small encoder; it changes trainings and seeds
        columns: labels or glob patterns of the columns that are made now, in place of all
        rows: labels or glob patterns of the rows that are made now, in place of all
        training_seeds: seeds of trainings that every number is the mean of; without them those of the table
        precision: of the Trainer, such as bf16-mixed, in training and scoring, in place of the recipes'
        output: folder of trainings and tables
        download: fetch models and data that are neither given nor in the cache of the hub
        dry_run: show what would be run, and run nothing
    """
    if table is None:
        _list()
        return
    paper = _read(table)
    given = Sources(_named(base, "--base"), _named(data, "--data"))
    cells = paper.cells(scale, given, training_seeds, precision)
    wanted = _wanted(paper, cells, columns, rows)
    from dpp_lightning.cli.paper_runs import PaperRuns
    from dpp_lightning.experiments.paper_report import Page

    folder = Path(output)
    notes = [f"**a stand-in**: {line}" for line in stand_ins(paper, given)]
    notes += [f"**scale {scale}**: other trainings and seeds than the paper's"] if scale != "paper" else []
    notes += [f"**precision {precision}**, in training and scoring"] if precision else []
    if left_out := [label for label in paper.columns if all(cell.column != label for cell in cells)]:
        notes.append(f"columns left out, since one base stands for several: {', '.join(left_out)}")

    def write() -> list[Path]:
        return Page(paper, cells, PaperRuns(folder, cells, relative=paper.relative).measured(), notes).write(
            folder / paper.name
        )

    runs = PaperRuns(folder, wanted, lambda text: say(f"dpp reproduce: {text}"), write)
    trainings, models = runs.missing()
    _check_sources(runs.trainings(), download=download or dry_run)
    say(f"dpp reproduce: {paper.title}: {trainings} trainings and {models} pruned models are to be made in {output}")
    if dry_run:
        sys.stdout.writelines(f"{training.key}\n" for training in runs.trainings())
        return
    try:
        runs.run()
    except KeyboardInterrupt:
        say("dpp reproduce: stopped. To go on where it was, repeat the command")
        raise
    finally:
        written = write()
    sys.stdout.write(written[0].read_text(encoding="utf-8"))
    say("\n".join(map(str, written)))


COMMAND = FunctionCommand(
    reproduce,
    example="dpp reproduce darex-table2 --scale small --base ENCODER --data glue=GLUE",
    groups={"stand-ins": "base", "the run": "output"},
)


def _list() -> None:
    tables = {name: read_table(path, name) for name, path in packaged_configs.tables().items()}
    ordered = sorted(tables.values(), key=lambda table: _in_order(table.name))
    width = max((len(table.name) for table in ordered), default=0)
    sys.stdout.writelines(f"{table.name:{width}}  {table.title}\n" for table in ordered)


def _in_order(name: str) -> list[tuple[str, int]]:
    """Table 2 before table 10."""
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", name)]


def _read(name: str) -> PaperTable:
    """The table of a file, or of a name, in which hyphens and underscores are one.

    Raises:
        ValueError: there is none, with the nearest; or a file that is wrong.
    """
    if (file := Path(name)).is_file():
        return read_table(file, file.stem.replace("_", "-"))
    tables = packaged_configs.tables()
    known = name.lower().replace("_", "-").removesuffix(packaged_configs.SUFFIX)
    if known not in tables:
        near = packaged_configs.did_you_mean(name, tables)
        raise ValueError(f"there is no table {name!r}{near} (dpp reproduce lists them)")
    return read_table(tables[known], known)


def _wanted(table: PaperTable, cells: Sequence[Cell], columns: Sequence[str], rows: Sequence[str]) -> list[Cell]:
    """The cells of the rows and columns that are asked for.

    Raises:
        ValueError: a label or pattern that is of none.
    """
    for option, patterns, labels in (("--columns", columns, table.columns), ("--rows", rows, table.rows)):
        for pattern in patterns:
            if not _matches(pattern, labels):
                raise ValueError(f"{option} {pattern!r} is none of {table.name}: {'; '.join(labels)}")
    of_columns = {label for pattern in columns or ["*"] for label in _matches(pattern, table.columns)}
    of_rows = {label for pattern in rows or ["*"] for label in _matches(pattern, table.rows)}
    return [cell for cell in cells if cell.column in of_columns and cell.row in of_rows]


def _matches(pattern: str, labels: Sequence[str]) -> list[str]:
    return [label for label in labels if label == pattern or fnmatchcase(label, pattern)]


def _named(values: Iterable[str], option: str) -> dict[str, str]:
    """Sources by name; one without a name has the name ``""``.

    Raises:
        ValueError: a name twice.
    """
    sources: dict[str, str] = {}
    for value in values:
        match = None if Path(value).exists() else _NAMED.fullmatch(value)
        name, source = match.groups() if match else ("", value)
        if name in sources:
            raise ValueError(f"{option} is given twice for {name or 'all'}: {sources[name]} and {source}")
        sources[name] = source
    return sources


def _check_sources(trainings: Sequence[Training], *, download: bool) -> None:
    """Refuse what is not there, all of it at once and before anything is run.

    Raises:
        FileNotFoundError: a folder that is not there, or a hub id that would be downloaded.
        ValueError: a folder that holds no model.
    """
    from dpp_lightning.storage.locate import hub_id, local_path
    from dpp_lightning.storage.source_kind import check_model

    bases = dict.fromkeys(training.base for training in trainings)
    data = dict.fromkeys(source for training in trainings for source in training.data.values())
    wanted = [("--base", source) for source in bases] + [("--data", source) for source in data]
    missing = []
    for option, source in wanted:
        if local_path(source).exists():
            if option == "--base":
                check_model(source, option, config=local_path(source).is_dir())
        elif hub_id(source) is None:
            missing.append(f"{option} {source} does not exist")
        elif not download and not _cached(source, "model" if option == "--base" else "dataset"):
            missing.append(f"{source} would be downloaded (--download allows it, {option} takes a folder in its place)")
    if missing:
        raise FileNotFoundError("; ".join(missing))


def _cached(repo_id: str, kind: str) -> bool:
    """Whether the hub's cache on this machine has files of a repository."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return any(repo.repo_id == repo_id and repo.repo_type == kind for repo in scan_cache_dir().repos)
    except CacheNotFound:
        return False
