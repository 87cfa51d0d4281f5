"""The trainings, sweeps and merges of a paper's table, each a command of ``dpp`` in a process of its own.

They lie in one output folder by what they are, not by the table that asks for them, so that tables share them. A
training that was killed goes on from its last epoch, a sweep from its last row; several processes with one output
folder share trainings and rows.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from dpp_lightning.cli import packaged_configs
from dpp_lightning.cli.child_command import CommandFailed, run_command
from dpp_lightning.experiments.claims import Claims
from dpp_lightning.experiments.grid import Result, delta_name
from dpp_lightning.experiments.paper_report import Measured
from dpp_lightning.experiments.paper_table import Cell, Merge, Training, layered, with_sources
from dpp_lightning.experiments.results import read_results, rows_of
from dpp_lightning.experiments.row_groups import Row, grid
from dpp_lightning.storage.atomic_write import atomic_file

_DONE, _RESULTS, _LOG = "training.json", "results.jsonl", "log.txt"
_ANY = ("dare", 0.9)  # what is pruned where a table only asks for unpruned models: a sweep needs a row
_GRID = ("method", "pruning_rate", "seeds")  # what a table says in place of the recipe
_POLL = 2.0  # seconds between two looks at what other processes train


@dataclass(frozen=True)
class Sweep:
    """Rows of one fine-tuned model under the same settings of the callback.

    Attributes:
        training: the model.
        settings: of the callback, beside methods, rates and seeds.
        first_seed: of masks, on which q is found for all of them.
        deltas: their folders are kept, for merges.
    """

    training: Training
    settings: str = "{}"
    first_seed: int = 0
    deltas: bool = False

    @classmethod
    def of(cls, cell: Cell, training: Training, first_seed: int | None = None) -> Sweep:
        """That of a cell; with a seed of its own that of a merge's deltas."""
        settings = json.dumps(cell.settings, sort_keys=True)
        first = cell.seeds[0] if first_seed is None else first_seed
        return cls(training, settings, first, deltas=first_seed is not None)

    @property
    def name(self) -> str:
        """Of its folder below the training's."""
        parts = ["deltas" if self.deltas else "sweep"]
        parts += [f"seed{self.first_seed}"] if self.first_seed else []
        parts += [sha256(self.settings.encode()).hexdigest()[:8]] if self.settings != "{}" else []
        return "-".join(parts)


@dataclass
class PaperRuns:
    """What the cells of a table need, made where it is not made yet.

    Args:
        folder: of all tables.
        cells: of the table.
        progress: called with what is done now.
        made: called after every step, when more cells may be known.
        relative: scores are in per cent of the unpruned model's.
    """

    folder: Path
    cells: Sequence[Cell]
    progress: Callable[[str], object] = lambda text: None
    made: Callable[[], object] = lambda: None
    relative: bool = False
    _steps: int = field(default=0, init=False)
    _all_steps: int = field(default=0, init=False)
    _failures: dict[str, int] = field(default_factory=dict, init=False)  # what failed, and the code it ended with

    def trainings(self) -> list[Training]:
        """Every training once, in the order of the cells."""
        each = [t for cell in self.cells for t in cell.trainings if not cell.merges]
        merged = [t for cell in self.cells for merge in cell.merges for t in merge.trainings.values()]
        return list(dict.fromkeys([*each, *merged]))

    def sweeps(self) -> dict[Sweep, set[Row]]:
        """The rows of every sweep."""
        rows: dict[Sweep, set[Row]] = {}
        for cell in self.cells:
            if cell.statistic is not None:
                continue
            for index, training in enumerate(cell.trainings):
                if cell.merges:
                    for number in range(len(cell.seeds)):
                        for sweep, row in _merge_sources(cell, cell.merges[index], number).values():
                            rows.setdefault(sweep, set()).add(row)
                elif cell.method is not None and cell.rate is not None:
                    sweep = Sweep.of(cell, training)
                    rows.setdefault(sweep, set()).update(grid([cell.method], [cell.rate], cell.seeds))
        for training in [t for cell in self.cells for t in cell.trainings if not cell.merges and not cell.statistic]:
            if not any(sweep.training == training and not sweep.deltas for sweep in rows):
                rows[Sweep(training)] = {(*_ANY, 0)}
        return rows

    def run(self) -> None:
        """Train, prune, merge and score what is missing. A command that fails stops only what needs its result.

        Raises:
            CommandFailed: commands ended with an error, all of which are named; everything else is made.
            OSError: the folder cannot be written.
        """
        sweeps, waiting = self.sweeps(), self.trainings()
        self._failures.clear()
        self._steps, self._all_steps = 0, self._count_steps(sweeps)
        claims = Claims(self.folder / ".claims")
        try:
            while waiting:
                began = len(waiting)
                for training in list(waiting):
                    if self._train(training, claims):
                        waiting.remove(training)
                        for sweep in [s for s in sweeps if s.training == training and self._is_trained(training)]:
                            self._sweep(sweep, sweeps[sweep])
                if len(waiting) == began:  # other processes are at them
                    time.sleep(_POLL)
        finally:
            claims.let_all_go()
        for cell in self.cells:
            for merge in cell.merges:
                self._tried(f"merging {', '.join(merge.trainings)}", partial(self._merge, cell, merge))
                self.made()
        if self._failures:
            raise CommandFailed("; ".join(self._failures), min(self._failures.values()))

    def _tried(self, what: str, make: Callable[[], object], *, final: bool = True) -> None:
        """Make something; report a command that fails, and remember it unless it is to be tried again."""
        try:
            make()
        except CommandFailed as error:
            self.progress(f"failed, and the rest goes on: {what}: {error}")
            self._failures |= {f"{what}: {error}": error.exit_code} if final else {}

    def _say(self, text: str) -> None:
        self._steps += 1
        self.progress(f"step {self._steps} of {max(self._all_steps, self._steps)}: {text}")

    def missing(self) -> tuple[int, int]:
        """How many trainings, and how many rows of sweeps, are still to be made."""
        trainings = sum(not self._is_trained(training) for training in self.trainings())
        rows = sum(len(rows - self._rows(sweep)) for sweep, rows in self.sweeps().items())
        return trainings, rows

    def measured(self) -> dict[int, Measured]:
        """What is known so far, by the index of the cell."""
        known = {index: self._measured(cell) for index, cell in enumerate(self.cells)}
        return {index: measured for index, measured in known.items() if measured is not None}

    def of_training(self, training: Training) -> Path:
        """The folder of a training, with its sweeps in it."""
        return self.folder / "trainings" / training.key

    def _count_steps(self, sweeps: Mapping[Sweep, set[Row]]) -> int:
        """How many commands, merges taken for one."""
        commands = sum(not self._is_trained(training) for training in self.trainings())
        commands += sum(len(self._missing_grids(sweep, rows)) for sweep, rows in sweeps.items())
        merged = {
            self._merge_folder(cell, merge, number) / merge.task: None
            for cell in self.cells
            for merge in cell.merges
            for number in range(len(cell.seeds))
        }
        return commands + sum(not _score_file(folder.parent, folder.name).exists() for folder in merged)

    def _is_trained(self, training: Training) -> bool:
        return (self.of_training(training) / _DONE).exists()

    def _train(self, training: Training, claims: Claims) -> bool:
        """Fine-tune, if that is not done and no other process is at it; whether it is done, or failed."""
        if self._is_trained(training):
            return True
        if not claims.take(training.key):
            return False
        try:
            if not self._is_trained(training):  # or by one that has just ended
                self._tried(f"training {training.key}", lambda: self._fit(training))
        finally:
            claims.let_go(training.key)
        return True

    def _fit(self, training: Training) -> None:
        folder = self.of_training(training)
        self._say(f"training {training.name}, seed {training.seed}")
        config = fit_config(training, folder)
        _write(folder / "fit.yaml", yaml.safe_dump(config, sort_keys=False))
        checkpoint, began = folder / "last.ckpt", folder / "seconds.json"
        before = _spent(checkpoint, began)
        _write(began, json.dumps({"before": before, "since": time.time()}))
        resume = ["--ckpt_path", str(checkpoint)] if checkpoint.exists() else []
        start = time.monotonic()
        run_command(["fit", "--config", str(folder / "fit.yaml"), *resume], folder / _LOG)
        seconds = before + time.monotonic() - start
        _write(folder / _DONE, json.dumps({"seconds": round(seconds, 1)}) + "\n")

    def _sweep(self, sweep: Sweep, rows: Collection[Row]) -> None:
        """Make the missing rows, in as few commands as there are different sets of methods and seeds.

        Where a command fails, each of its methods is tried alone.
        """
        for methods, rates, seeds in self._missing_grids(sweep, rows):
            alone = [[method] for method in methods]
            for some in [methods, *alone] if len(methods) > 1 else alone:
                if not self._rows(sweep).issuperset(grid(some, rates, seeds)):
                    what = f"pruning {sweep.training.key} by {', '.join(some)}"
                    self._tried(what, partial(self._prune, sweep, some, rates, seeds), final=len(some) == 1)
            self.made()

    def _prune(self, sweep: Sweep, methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> None:
        folder = self.of_training(sweep.training)
        self._say(f"pruning {sweep.training.name}, seed {sweep.training.seed}: {', '.join(methods)}")
        config = folder / f"{sweep.name}.yaml"
        _write(config, yaml.safe_dump(sweep_config(sweep, folder), sort_keys=False))
        words = ["sweep", "--config", str(config), "--ckpt_path", str(folder / "last.ckpt")]
        words += ["--methods", *methods, "--rates", *map(repr, rates), "--seeds", *map(str, seeds)]
        words += ["--output", str(folder / sweep.name)] + ([] if sweep.deltas else ["--no_deltas"])
        run_command(words, folder / _LOG)

    def _missing_grids(self, sweep: Sweep, rows: Collection[Row]) -> list[tuple[list[str], list[float], list[int]]]:
        """The grids of a sweep of which rows are still to be made; each begins with the seed that q is found on."""
        made = self._rows(sweep)
        return [words for words in _grids(rows) if not made.issuperset(grid(*words))]

    def _rows(self, sweep: Sweep) -> frozenset[Row]:
        return rows_of(self._results(sweep))

    def _results(self, sweep: Sweep) -> list[Result]:
        return read_results(self.of_training(sweep.training) / sweep.name / _RESULTS)

    def _merge(self, cell: Cell, merge: Merge) -> None:
        """Merge the deltas of every mask seed, and score the cell's task."""
        for number in range(len(cell.seeds)):
            folder = self._merge_folder(cell, merge, number)
            score = _score_file(folder, merge.task)
            if score.exists():
                continue
            sources = _merge_sources(cell, merge, number)
            paths = [self.of_training(s.training) / s.name / delta_name(*row) for s, row in sources.values()]
            self._say(f"merging {', '.join(merge.trainings)}: {cell.method}, scored on {merge.task}")
            base = next(iter(merge.trainings.values())).base
            if not (folder / "delta").exists():
                words = ["merge", base, *map(str, paths), "--tasks", *merge.trainings, "--method", merge.method]
                run_command([*words, "--scale", repr(merge.scale), "--output", str(folder / "delta")], folder / _LOG)
            config = fit_config(merge.trainings[merge.task], folder)
            config["trainer"] |= {
                "callbacks": [], "enable_checkpointing": False,
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": merge.task}},
            }  # fmt: skip
            _write(folder / f"{merge.task}.yaml", yaml.safe_dump(config, sort_keys=False))
            words = ["test", "--config", str(folder / f"{merge.task}.yaml"), "--delta", str(folder / "delta")]
            run_command([*words, "--task", merge.task], folder / _LOG)
            _write(score, json.dumps(_logged_score(folder / merge.task)) + "\n")

    def _merge_folder(self, cell: Cell, merge: Merge, number: int) -> Path:
        sources = _merge_sources(cell, merge, number)
        parts = [[s.training.key, s.name, row] for s, row in sources.values()] + [merge.method, merge.scale]
        name = "-".join([*merge.trainings, str(cell.method), sha256(json.dumps(parts).encode()).hexdigest()[:8]])
        return self.folder / "merges" / name

    def _measured(self, cell: Cell) -> Measured | None:
        if cell.merges:
            return self._measured_merge(cell)
        if not all(self._is_trained(training) for training in cell.trainings):
            return None
        seconds = tuple(map(self._seconds_of, cell.trainings))
        if cell.statistic is not None:
            return Measured(tuple(self._statistic(cell.statistic, training) for training in cell.trainings))
        values: list[float] = []
        sizes: list[int] = []
        for training in cell.trainings:
            rows = self._rows_of_cell(cell, training)
            if not rows:
                return None
            values += [100 * row.score / self._whole(training) for row in rows]
            sizes += [row.num_bytes for row in rows]
        return Measured(tuple(values), tuple(sizes), seconds)

    def _whole(self, training: Training) -> float:
        """What scores are in hundredths of: 1, or the unpruned model's score."""
        if not self.relative:
            return 1.0
        unpruned = self._reference(training, "fine-tuned")
        return unpruned[0].score if unpruned else float("nan")

    def _reference(self, training: Training, name: str) -> list[Result]:
        """The row of the base or of the unpruned model, which any sweep of the training has; none before the first."""
        files = self.of_training(training).glob(f"*/{_RESULTS}")
        return [row for file in sorted(files) for row in read_results(file) if row.method == name][:1]

    def _rows_of_cell(self, cell: Cell, training: Training) -> list[Result]:
        """All of them, or none."""
        if cell.method is not None and cell.rate is not None:
            wanted = set(grid([cell.method], [cell.rate], cell.seeds))
            results = self._results(Sweep.of(cell, training))
            rows = [r for r in results if (r.method, r.pruning_rate, r.seed) in wanted]
            return rows if len(rows) == len(wanted) else []
        return self._reference(training, "base" if cell.of_base else "fine-tuned")

    def _measured_merge(self, cell: Cell) -> Measured | None:
        values = []
        for merge in cell.merges:
            for number in range(len(cell.seeds)):
                file = _score_file(self._merge_folder(cell, merge, number), merge.task)
                if not file.exists():
                    return None
                score = float(json.loads(file.read_text()))
                values.append(100 * score / self._whole(merge.trainings[merge.task]))
        return Measured(tuple(values))

    def _seconds_of(self, training: Training) -> float:
        return float(json.loads((self.of_training(training) / _DONE).read_text())["seconds"])

    def _statistic(self, name: str, training: Training) -> float:
        """Computed once, and kept beside the checkpoint."""
        folder = self.of_training(training)
        file = folder / "statistics.json"
        if not file.exists():
            from dpp_lightning.analysis.entry_statistics import EntryStatistics

            statistics = EntryStatistics.between(training.base, folder / "last.ckpt")
            _write(file, json.dumps(vars(statistics)) + "\n")
        return float(json.loads(file.read_text())[name])


def fit_config(training: Training, folder: Path) -> dict[str, Any]:
    """What ``dpp fit`` runs: the recipe with its layers, without the callback that prunes.

    Args:
        training: what is trained.
        folder: of the checkpoint.

    Raises:
        UsageError: there is no such recipe.
    """
    config: dict[str, Any] = yaml.safe_load(packaged_configs.read(training.recipe))
    for layer in [*training.layers, with_sources(training)]:
        config = layered(config, layer)
    others = [
        c
        for c in config["trainer"].get("callbacks") or []
        if not _is_one_of(c, ("DeltaPruneCallback", "ModelCheckpoint"))
    ]
    last = {"dirpath": str(folder), "filename": "last", "enable_version_counter": False}
    config["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": last}, *others]
    config["trainer"]["default_root_dir"] = str(folder)
    config["seed_everything"] = training.seed
    return config


def sweep_config(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """What ``dpp sweep`` runs: the training's config with no other callback than the recipe's that prunes.

    Args:
        sweep: what is pruned.
        folder: of the training.
    """
    config = fit_config(sweep.training, folder)
    recipe = yaml.safe_load(packaged_configs.read(sweep.training.recipe))
    pruning = [c for c in recipe["trainer"].get("callbacks") or [] if _is_one_of(c, ("DeltaPruneCallback",))]
    settings = {name: value for c in pruning for name, value in c["init_args"].items() if name not in _GRID}
    prune = {"class_path": "DeltaPruneCallback", "init_args": {**settings, **json.loads(sweep.settings)}}
    config["trainer"]["callbacks"] = [prune]
    return config


def _grids(rows: Collection[Row]) -> list[tuple[list[str], list[float], list[int]]]:
    """Methods, rates and seeds whose grids together are these rows."""
    seeds_of: dict[tuple[str, float], list[int]] = {}
    for method, rate, seed in sorted(rows):
        seeds_of.setdefault((method, rate), []).append(seed)
    longest = max(seeds_of.values(), key=len, default=[])
    methods_of: dict[tuple[float, tuple[int, ...]], list[str]] = {}
    for (method, rate), seeds in seeds_of.items():
        draws_nothing = grid([method], [rate], longest) == grid([method], [rate], seeds)  # and has one seed
        methods_of.setdefault((rate, tuple(longest if draws_nothing else seeds)), []).append(method)
    rates_of: dict[tuple[tuple[str, ...], tuple[int, ...]], list[float]] = {}
    for (rate, of_rate), methods in methods_of.items():
        rates_of.setdefault((tuple(methods), of_rate), []).append(rate)
    return [(list(methods), rates, list(of_rate)) for (methods, of_rate), rates in rates_of.items()]


def _merge_sources(cell: Cell, merge: Merge, number: int) -> Mapping[str, tuple[Sweep, Row]]:
    """The delta of every task of the merge of one mask seed: its sweep and its row."""
    assert cell.method is not None
    assert cell.rate is not None
    sources = {}
    for index, (task, training) in enumerate(merge.trainings.items()):
        seeds = [seed * len(merge.trainings) + index if merge.distinct_seeds else seed for seed in cell.seeds]
        rows = grid([cell.method], [cell.rate], seeds)  # one, of a method that draws nothing
        sources[task] = (Sweep.of(cell, training, seeds[0]), rows[number % len(rows)])
    return sources


def _score_file(folder: Path, task: str) -> Path:
    return folder / f"score-{task}.json"


def _is_one_of(callback: Any, names: Collection[str]) -> bool:
    return isinstance(callback, Mapping) and str(callback.get("class_path", "")).rpartition(".")[2] in names


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _spent(checkpoint: Path, began: Path) -> float:
    """Seconds that went into a checkpoint which a killed training left."""
    if not (checkpoint.exists() and began.exists()):
        return 0.0
    times = json.loads(began.read_text())
    return float(times["before"]) + max(checkpoint.stat().st_mtime - float(times["since"]), 0.0)


def _logged_score(folder: Path) -> float:
    """The score of ``dpp test`` in the log of the last version.

    Raises:
        ValueError: it logged none.
    """
    versions = sorted(folder.glob("version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    with (versions[-1] / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("test_score"):
                return float(row["test_score"])
    raise ValueError(f"{versions[-1]} has no test_score")
