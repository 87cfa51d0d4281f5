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
from dpp_lightning.callbacks.prune_run.hf_passes import HFPasses
from dpp_lightning.callbacks.prune_run.lora_view import ADAPTER_FOLDER, find_adapter, save_adapter
from dpp_lightning.callbacks.prune_run.progress import (
    RESULTS_FILE,
    Reporter,
    mean_scores,
    report_carried,
)
from dpp_lightning.callbacks.prune_run.run_identity import run_identity
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.experiments.grid import Experiment, Result
from dpp_lightning.experiments.results import ResultsLog
from dpp_lightning.experiments.tables import console_table
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.model_folder import changed_side_files, side_files
from dpp_lightning.tensors.names import canonical_tensors


class HFPruneRun:
    """One run.

    Args:
        settings: of the callback.
        passes: of the trainer, whose model holds the fine-tuned weights.
        base: theta_0.
        scope: the settings' scope with new heads and buffers carried.
        new: canonical names of the parameters that were new in this training.
        batch: calibration batch; None where no method needs one.
        labelled: data for the objective ``metric``; None where it is not needed.
        source: name of the data that q is found on.
        folder: for the deltas and ``results.jsonl``.
        reporter: is called with every row as it is made.
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
        self.results: list[Result] = []

    def run(self) -> list[Result]:
        """Make all rows and report them.

        Afterwards the model holds the fine-tuned weights again, bit for bit, unless ``apply`` is set.

        Returns:
            The rows of base and fine-tuned model, then of the pruned ones.
        """
        settings, passes = self.settings, self.passes
        self.reporter.begin(settings.rows, 0)
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
            base = self._reference("base")
            experiment.reference_scores = {"base": base.score, "fine-tuned": finetuned.score}
            self._record(base)
            self._record(replace(finetuned, density=1.0, num_bytes=total_bytes(plan.finetuned), ratio=1.0))
            for result in experiment.run(settings.methods, settings.rates, settings.seeds):
                self._save_adapter(experiment, result)
                self._record(result)
        if settings.apply:
            assert experiment.last is not None
            leave_pruned(self.module, self.base, replaced, experiment.last)
        self._report()
        return self.results

    def _measured_change(self) -> Callable[[], float] | None:
        """Change of the outputs on the calibration batch against the fine-tuned model, whose weights are held now."""
        if self.batch is None:
            return None
        change = OutputChange(partial(self.passes.outputs, self.batch), self.settings.output_measure)
        change.take_reference()
        return change

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
            folder=self.folder if settings.save_deltas else None,
            dtype=settings.dtype,
            method_settings=settings.method_settings,
            split=passes.split,
            q_split=self.source,
            side_files=self._side_files(),
            monitor=passes.monitor,
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

    def _reference(self, method: str) -> Result:
        start = time.perf_counter()
        score = self.passes.score()
        return Result(method, score, seconds=time.perf_counter() - start, split=self.passes.split)

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
        self.log.append(result)
        self.reporter.row(result, self.passes.monitor)

    def _report(self) -> None:
        """The table on the console, and the mean scores for the trainer's loggers."""
        settings, monitor = self.settings, self.passes.monitor
        self.passes.trainer.log(mean_scores(self.results, settings, monitor))
        console_table(self.results, monitor)
        written = f"deltas and {RESULTS_FILE}" if settings.save_deltas else RESULTS_FILE
        rank_zero_info(f"{written} are in {self.folder}")
