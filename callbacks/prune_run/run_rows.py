"""The rows of a run: base, fine-tuned and pruned models, each written and reported as soon as it is scored."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

from torch import nn

from dpp_lightning.callbacks.prune_run.lora_view import ADAPTER_FOLDER, find_adapter, save_adapter
from dpp_lightning.callbacks.prune_run.progress import Reporter
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.experiments.grid import Experiment, QCurve, Result
from dpp_lightning.experiments.results import ResultsLog, rows_of
from dpp_lightning.methods.registry import get_method
from dpp_lightning.storage.checkpoints import total_bytes

PLOT_POINTS = 12  # of a curve over q


class ScoringPasses(Protocol):
    """Passes of a trainer over the scored data, with the weights as they stand."""

    @property
    def monitor(self) -> str:
        """Name of the metric that is the score."""
        ...

    @property
    def split(self) -> str:
        """Name of the data."""
        ...

    def score(self) -> float:
        """The monitored metric."""
        ...


class RunRows:
    """The rows of one run, those of an earlier run included.

    Args:
        settings: of the callback.
        module: holds the weights.
        passes: score them.
        log: the file of the rows.
        results: the rows that an earlier run made.
        reporter: is called with every row as it is made.
        writes: this process appends rows to the file.

    Attributes:
        results: the rows so far, those of base and fine-tuned model first.
        done: (method, rate, seed) of the rows of pruned models that an earlier run made.
    """

    def __init__(
        self,
        settings: PruneSettings,
        module: nn.Module,
        passes: ScoringPasses,
        log: ResultsLog,
        results: list[Result],
        reporter: Reporter,
        *,
        writes: bool,
    ) -> None:
        self.settings, self.module, self.passes, self.log = settings, module, passes, log
        self.results, self.reporter, self.writes = results, reporter, writes
        self.done = rows_of(results)

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
        experiment.stage = self.reporter.stage
        for result in experiment.run(settings.methods, settings.rates, settings.seeds):
            self._save_adapter(experiment, result)
            self._record(result)
        return self._curves(experiment) if settings.plot else []

    def _record_references(self, experiment: Experiment, finetuned: Result) -> None:
        """The rows of the base (the whole delta dropped, carried tensors kept) and of the fine-tuned model."""
        base = self.reference("base")
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
        self.log.monitor = self.passes.monitor  # the first pass may have found its full name
        if self.writes:
            self.log.append(result)
        self.reporter.row(result, self.passes.monitor)

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
