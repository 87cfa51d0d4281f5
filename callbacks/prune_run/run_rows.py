"""The rows of a run: base, fine-tuned and pruned models, each written and reported as soon as it is scored."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dpp_lightning.callbacks.prune_run.lora_view import ADAPTER_FOLDER, find_adapter, save_adapter
from dpp_lightning.callbacks.prune_run.progress import Reporter
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.callbacks.prune_run.turns import Ranks, Turns
from dpp_lightning.experiments.grid import Experiment, QCurve, Result
from dpp_lightning.experiments.results import rows_of
from dpp_lightning.experiments.row_groups import Row, row_groups
from dpp_lightning.methods.registry import get_method
from dpp_lightning.storage.checkpoints import total_bytes

PLOT_POINTS = 12  # of a curve over q


class ScoringPasses(Ranks, Protocol):
    """Passes of a trainer over the scored data, with the weights as they stand."""

    @property
    def monitor(self) -> str:
        """Name of the metric that is the score."""
        ...

    @monitor.setter
    def monitor(self, name: str) -> None: ...

    @property
    def split(self) -> str:
        """Name of the data."""
        ...

    def score(self) -> float:
        """The monitored metric."""
        ...


class RunRows:
    """The rows of one run, those of an earlier run and of other workers included.

    Args:
        settings: of the callback.
        module: holds the weights.
        passes: score them.
        turns: say which rows this process makes, and write them.
        reporter: is called with every row as it is made.

    Attributes:
        results: the rows so far: of base and fine-tuned model, of pruned models outside the run's grid, of those in it.
    """

    def __init__(
        self, settings: PruneSettings, module: nn.Module, passes: ScoringPasses, turns: Turns, reporter: Reporter
    ) -> None:
        self.settings, self.module, self.passes, self.turns = settings, module, passes, turns
        self.results: list[Result] = []
        self.reporter = reporter

    @property
    def done(self) -> frozenset[Row]:
        """(method, rate, seed) of the pruned models whose rows there are."""
        return rows_of(self.results)

    def begin(self) -> None:
        """Take what an earlier run, or other workers, have made so far.

        Raises:
            ValueError: that is of another run.
        """
        self.results, self.passes.monitor = self.turns.begin()
        self._sort()

    @cached_property
    def reports(self) -> bool:
        """Whether this process reports the rows. To be asked when all are made; all ranks must ask."""
        return self.turns.reports()

    def pending(self) -> list[Row]:
        """The rows of the grid that are not made."""
        done = self.done
        return [row for row in self.settings.rows if row not in done]

    def resumed(self, method: str) -> Result | None:
        """The row of the base or of the fine-tuned model, if an earlier run made it."""
        return next((result for result in self.results if result.method == method), None)

    def reference(self, method: str) -> Result:
        """The row of the base or of the fine-tuned model, whose weights the module holds; it is not recorded yet."""
        if (resumed := self.resumed(method)) is not None:
            return resumed
        start = time.perf_counter()
        score = self.passes.score()
        return Result(method, score, seconds=time.perf_counter() - start, split=self.passes.split)

    def make(self, experiment: Experiment, finetuned: Result) -> list[QCurve]:
        """Make and record the rows that are missing, while the module holds the base's weights.

        Args:
            experiment: on the module.
            finetuned: the row of the fine-tuned model, scored before.

        Returns:
            Curves over q, if a plot is asked for.
        """
        settings = self.settings
        self._record_references(experiment, finetuned)
        self.turns.references_made()
        experiment.stage, experiment.begins = self.reporter.stage, self._begins
        groups = row_groups(settings.methods, settings.rates, settings.seeds)
        while not (step := self.turns.next(groups, self.results)).over:
            self.results = step.results
            if step.group is None:
                self.reporter.next(None, len(self.done))
                continue
            for result in experiment.run(step.group, self.done):
                self._save_adapter(experiment, result)
                self._record(result)
            self.turns.made(step.group)
        self.results = step.results
        self._sort()
        return self._curves(experiment) if settings.plot and self.reports else []

    def _record_references(self, experiment: Experiment, finetuned: Result) -> None:
        """The rows of the base (the whole delta dropped, carried tensors kept) and of the fine-tuned model."""
        base = self.reference("base")
        if base.score == finetuned.score and self.resumed("base") is None:
            rank_zero_warn(
                f"the base and the fine-tuned model have one score, {base.score:g}: fine-tuning does not change it, or "
                f"monitor={self.passes.monitor!r} is carried from one evaluation to the next, as the best one so far is"
            )
        experiment.reference_scores = {"base": base.score, "fine-tuned": finetuned.score}
        dense = total_bytes(experiment.plan.finetuned)
        for result in (base, replace(finetuned, density=1.0, num_bytes=dense, ratio=1.0)):
            if self.resumed(result.method) is None:
                self._record(result)

    def _save_adapter(self, experiment: Experiment, result: Result) -> None:
        """Save the pruned LoRA adapter, if there is one, as a PEFT folder inside the delta's."""
        adapter = find_adapter(self.module)
        if adapter is None or self.settings.lora == "merged" or experiment.folder is None:
            return
        assert experiment.last is not None
        assert result.folder is not None
        with experiment.last.applied(self.module, force=True):
            save_adapter(adapter, experiment.folder / result.folder / ADAPTER_FOLDER)

    def _record(self, result: Result) -> None:
        """Add a row and write it at once, so that it stays if the run is stopped; then report it."""
        if not self.settings.save_deltas:
            result = replace(result, folder=None)
        self.results.append(result)
        self.turns.record(result, self.passes.monitor)
        self.reporter.row(result, self.passes.monitor)

    def _begins(self, row: Row) -> None:
        self.reporter.next(row, len(self.done))

    def _sort(self) -> None:
        """Have the rows in the order of the grid, whatever the order in which they were made."""
        order: dict[tuple[str, float | None, int | None], int]
        order = {row: number for number, row in enumerate(self.settings.rows)}
        self.results.sort(key=lambda r: (r.pruning_rate is not None, order.get((r.method, r.pruning_rate, r.seed), -1)))

    def _curves(self, experiment: Experiment) -> list[QCurve]:
        """Score and output change over q for each rate on the first seed's mask, with the q that a method found."""
        settings, curves = self.settings, []
        for rate in settings.rates:
            rows = [r for r in self.results if r.pruning_rate == rate]
            if isinstance(settings.plot, str):
                rows = [r for r in rows if r.method == settings.plot]
            chosen = next((r.q for r in rows if (fit := get_method(r.method).fit) is not None and fit.one_q), None)
            curves.append(experiment.curve(rows[0].method, rate, settings.seeds[0], PLOT_POINTS, chosen))
        return curves
