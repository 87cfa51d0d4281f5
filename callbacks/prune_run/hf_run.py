"""One run in a Hugging Face ``Trainer``: its model's weights are pruned, scored and saved, and then put back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpp_lightning.calibration.output_change import OutputChange
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.exchanged_models import exchanged_plan, leave_pruned, transformers_config
from dpp_lightning.callbacks.prune_run.fit_notices import prefix_of
from dpp_lightning.callbacks.prune_run.hf_passes import HFPasses, from_first
from dpp_lightning.callbacks.prune_run.hf_trainer_checks import hf_folder, pruning_callbacks
from dpp_lightning.callbacks.prune_run.hub_upload import push_deltas
from dpp_lightning.callbacks.prune_run.lora_view import ADAPTER_FOLDER, find_adapter, save_adapter
from dpp_lightning.callbacks.prune_run.progress import (
    RESULTS_FILE,
    Reporter,
    mean_scores,
    report_carried,
)
from dpp_lightning.callbacks.prune_run.run import PLOT_POINTS
from dpp_lightning.callbacks.prune_run.run_identity import run_identity
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.experiments.grid import Experiment, QCurve, Result
from dpp_lightning.experiments.plots import plot_over_q
from dpp_lightning.experiments.results import PLOT_FILE, ResultsLog, rows_of
from dpp_lightning.experiments.tables import console_table
from dpp_lightning.methods.registry import get_method
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.model_folder import changed_side_files, side_files
from dpp_lightning.tensors.names import canonical_tensors


class HFPruneRun:
    """One run. All processes make it together; the first one writes.

    Args:
        settings: of the callback.
        passes: of the trainer, whose model holds the fine-tuned weights.
        base: theta_0.
        scope: the settings' scope with new heads and buffers carried.
        new: canonical names of the parameters that were new in this training.
        batch: calibration batch; None where no method needs one.
        labelled: data for the objective ``metric``; None where it is not needed.
        source: name of the data that q is found on.
        folder: for the deltas, ``results.jsonl`` and the plot.
        reporter: is called with every row as it is made.

    Raises:
        ValueError: if ``resume`` finds another run's rows.
    """

    def __init__(
        self,
        settings: PruneSettings,
        passes: HFPasses,
        base: BaseWeights,
        scope: Scope,
        new: set[str],
        batch: Any,
        labelled: Any,
        source: str,
        folder: Path,
        reporter: Reporter,
    ) -> None:
        self.settings, self.passes, self.base, self.scope = settings, passes, base, scope
        self.batch, self.labelled, self.source = batch, labelled, source
        self.folder, self.reporter, self.module = folder, reporter, passes.module
        method_settings = {name: settings.method_settings.get(name, {}) for name in settings.methods}
        identity = run_identity(settings, base, self.module, new, passes.monitor, passes.split)
        self.log = ResultsLog(folder / RESULTS_FILE, passes.monitor, identity, method_settings)
        self.results: list[Result] = from_first(passes.trainer, self.log.resume() if settings.resume else [])
        self.done = rows_of(self.results)

    def run(self) -> list[Result]:
        """Make the rows that are missing and report all of them.

        Afterwards the model holds the fine-tuned weights again, bit for bit, unless ``apply`` is set.

        Returns:
            The rows of base and fine-tuned model, then of the pruned ones, those of an earlier run included.
        """
        settings = self.settings
        pending = [row for row in settings.rows if row not in self.done]
        self.reporter.begin(pending, len(self.done))
        curves: list[QCurve] = []
        if pending or settings.plot or len(self.results) < 2:
            curves = self._make_rows()
        self._report(curves)
        if settings.push_to_hub is not None and self.passes.is_first:
            push_deltas(self.folder, settings.repositories, private=settings.hub_private)
        return self.results

    def _make_rows(self) -> list[QCurve]:
        """Score the fine-tuned model, the base and every pruned model; curves over q if a plot is asked for."""
        settings, passes = self.settings, self.passes
        change = self._measured_change()
        inputs = passes.layer_inputs(self.batch) if settings.needs_inputs else {}
        gradients = passes.output_gradients(self.batch) if settings.methods_with_gradients else None
        finetuned = self._reference("fine-tuned")
        tensors = canonical_tensors(self.module)
        fates = self.scope.fates(self.base.tensors, tensors)
        replaced = [name for name, fate in fates.items() if fate != "carry"]
        report_carried({name: tensors[name] for name, fate in fates.items() if fate == "carry"})
        with self.base.exchanged(self.module, replaced):
            plan = exchanged_plan(self.module, self.base, replaced, self.scope, settings.pretrained, settings.revision)
            experiment = self._experiment(self._with_inputs(plan, inputs), change)
            experiment.gradients = gradients
            self._record_references(experiment, finetuned)
            for result in experiment.run(settings.methods, settings.rates, settings.seeds):
                self._save_adapter(experiment, result)
                self._record(result)
            curves = self._curves(experiment) if settings.plot else []
        if settings.apply:
            assert experiment.last is not None  # apply is not combined with resume, so a row was made
            leave_pruned(self.module, self.base, replaced, experiment.last)
        return curves

    def _measured_change(self) -> Callable[[], float] | None:
        """Change of the outputs on the calibration batch against the fine-tuned model, whose weights are held now."""
        if self.batch is None:
            return None
        change = OutputChange(partial(self.passes.outputs, self.batch), self.settings.output_measure)
        change.take_reference()
        # the first process's value on all, since rounding could make their searches differ
        return lambda: float(from_first(self.passes.trainer, change()))

    def _with_inputs(self, plan: PruningPlan, inputs: Any) -> PruningPlan:
        if not self.settings.needs_inputs:
            return plan
        plan = plan.with_inputs(inputs)
        for method in self.settings.methods:
            if unknown := unknown_inputs(plan.pairs, method, self.settings.method_settings.get(method, {})):
                rank_zero_warn(unknown)
        return plan

    def _experiment(self, plan: PruningPlan, change: Callable[[], float] | None) -> Experiment:
        settings, passes = self.settings, self.passes
        return Experiment(
            plan=plan,
            target=self.module,
            score=passes.score,
            change=change,
            metric=None if self.labelled is None else partial(passes.score, self.labelled),
            objective=settings.objective,
            higher_is_better=settings.mode == "max",
            folder=self.folder if settings.save_deltas and passes.is_first else None,
            dtype=settings.dtype,
            method_settings=settings.method_settings,
            split=passes.split,
            q_split=self.source,
            side_files=self._side_files(),
            monitor=passes.monitor,
            done=self.done,
        )

    def _side_files(self) -> dict[str, bytes]:
        """Configuration and tokenizer for the deltas' folders; with ``pretrained`` only what is not the base's."""
        settings, model = self.settings, self.module
        with TemporaryDirectory() as folder:
            for name, content in transformers_config(model).items():
                (Path(folder) / name).write_bytes(content)
            parts: tuple[Any, ...] = (self.passes.trainer.processing_class, getattr(model, "generation_config", None))
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(folder)
            found: dict[str, Path | None] = dict(side_files(folder))
            if settings.pretrained is not None and Path(settings.pretrained).is_dir():
                found = changed_side_files(settings.pretrained, folder, settings.revision)
            return {name: path.read_bytes() for name, path in found.items() if path is not None}

    def _resumed(self, method: str) -> Result | None:
        """The row of the base or of the fine-tuned model, if an earlier run made it."""
        return next((result for result in self.results if result.method == method), None)

    def _reference(self, method: str) -> Result:
        """The row of the base or of the fine-tuned model, whose weights the model holds."""
        if (resumed := self._resumed(method)) is not None:
            return resumed
        start = time.perf_counter()
        score = self.passes.score()
        return Result(method, score, seconds=time.perf_counter() - start, split=self.passes.split)

    def _record_references(self, experiment: Experiment, finetuned: Result) -> None:
        """The rows of the base (the whole delta dropped, carried tensors kept) and of the fine-tuned model."""
        base = self._reference("base")
        experiment.reference_scores = {"base": base.score, "fine-tuned": finetuned.score}
        dense = total_bytes(experiment.plan.finetuned)
        for result in (base, replace(finetuned, density=1.0, num_bytes=dense, ratio=1.0)):
            if self._resumed(result.method) is None:
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
        if self.passes.is_first:
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

    def _report(self, curves: list[QCurve]) -> None:
        """The table on the console, a plot of the curves, and the mean scores for the trainer's loggers."""
        settings, monitor, trainer = self.settings, self.passes.monitor, self.passes.trainer
        folders = [hf_folder(other, trainer) for other in pruning_callbacks(trainer)]
        trainer.log(mean_scores(self.results, settings, monitor, prefix_of(self.folder, folders)))
        if not self.passes.is_first:
            return
        console_table(self.results, monitor)
        if curves:
            base, finetuned = (row.score for row in self.results[:2])
            plot_over_q(curves, self.folder / PLOT_FILE, monitor=monitor, finetuned=finetuned, base=base)
        written = f"deltas and {RESULTS_FILE}" if settings.save_deltas else RESULTS_FILE
        rank_zero_info(f"{written} are in {self.folder}")
