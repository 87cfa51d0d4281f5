"""One run in a Hugging Face ``Trainer``: its model's weights are pruned, scored and saved, and then put back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainingArguments

from dpp_lightning.calibration.output_change import OutputChange
from dpp_lightning.calibration.pieces import pieces_of
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.calibration_data import measured_on, with_known_inputs
from dpp_lightning.callbacks.prune_run.exchanged_models import exchanged_plan, leave_pruned
from dpp_lightning.callbacks.prune_run.fit_notices import prefix_of
from dpp_lightning.callbacks.prune_run.hf_passes import HFPasses, from_first
from dpp_lightning.callbacks.prune_run.hf_trainer_checks import hf_folder, pruning_callbacks
from dpp_lightning.callbacks.prune_run.hub_upload import push_deltas
from dpp_lightning.callbacks.prune_run.logger_report import RunReport, boards_of_transformers, show_run
from dpp_lightning.callbacks.prune_run.model_config import model_config_file
from dpp_lightning.callbacks.prune_run.progress import (
    RESULTS_FILE,
    Reporter,
    mean_scores,
    report_carried,
    save_plot_and_name_files,
)
from dpp_lightning.callbacks.prune_run.run_identity import run_identity
from dpp_lightning.callbacks.prune_run.run_rows import RunRows
from dpp_lightning.callbacks.prune_run.settings import SAMPLES, PruneSettings
from dpp_lightning.callbacks.prune_run.turns import Alone
from dpp_lightning.experiments.grid import Experiment, QCurve, Result
from dpp_lightning.experiments.results import ResultsLog
from dpp_lightning.experiments.tables import console_table
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
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
        identity = run_identity(
            settings, base, self.module, new, passes.monitor, passes.split, precision=_precision(passes.trainer.args)
        )
        log = ResultsLog(folder / RESULTS_FILE, passes.monitor, identity, method_settings)
        turns = Alone(log, passes, resume=settings.resume, writes=passes.is_first)
        self.rows = RunRows(settings, self.module, passes, turns, reporter)

    def run(self) -> list[Result]:
        """Make the rows that are missing and report all of them.

        Afterwards the model holds the fine-tuned weights again, bit for bit, unless ``apply`` is set.

        Returns:
            The rows of base and fine-tuned model, then of the pruned ones, those of an earlier run included.

        Raises:
            ValueError: if another run's rows are there, which are to be kept.
        """
        settings = self.settings
        self.rows.begin()
        pending = self.rows.pending()
        self.reporter.begin(pending, len(self.rows.done))
        curves: list[QCurve] = []
        if pending or settings.plot or len(self.rows.results) < 2:
            curves = self._make_rows()
        self._report(curves)
        if settings.push_to_hub is not None and self.passes.is_first:
            push_deltas(self.folder, settings.repositories, private=settings.hub_private)
        return self.rows.results

    def _make_rows(self) -> list[QCurve]:
        """Score the fine-tuned model, the base and every pruned model; curves over q if a plot is asked for."""
        settings, passes = self.settings, self.passes
        change = self._measured_change()
        uses_inputs = settings.needs_inputs or settings.uses_moments
        pieces = pieces_of(self.batch, SAMPLES) if uses_inputs else []
        inputs = passes.layer_inputs(pieces, products=settings.uses_moments) if uses_inputs else {}
        gradients = passes.output_gradients(measured_on(self.batch)) if settings.methods_with_gradients else None
        blocks = settings.scope.blocks
        distillation = passes.distillation(self.batch, blocks) if settings.methods_that_train else None
        finetuned = self.rows.reference("fine-tuned")
        tensors = canonical_tensors(self.module)
        fates = self.scope.fates(self.base.tensors, tensors)
        replaced = [name for name, fate in fates.items() if fate != "carry"]
        with self.base.exchanged(self.module, replaced):
            plan = exchanged_plan(self.module, self.base, replaced, self.scope, settings.pretrained, settings.revision)
            report_carried(plan.carried, self.reporter)
            experiment = self._experiment(with_known_inputs(plan, inputs, settings), change)
            experiment.gradients, experiment.distillation = gradients, distillation
            curves = self.rows.make(experiment, finetuned)
        if settings.apply:
            assert experiment.last is not None  # apply is not combined with resume, so a row was made
            leave_pruned(self.module, self.base, replaced, experiment.last)
        return curves

    def _measured_change(self) -> Callable[[], float] | None:
        """Change of the outputs on the calibration batch against the fine-tuned model, whose weights are held now."""
        if self.batch is None:
            return None
        change = OutputChange(partial(self.passes.outputs, measured_on(self.batch)), self.settings.output_measure)
        change.take_reference()
        # the first process's value on all, since rounding could make their searches differ
        return lambda: float(from_first(self.passes.trainer, change()))

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
        )

    def _side_files(self) -> dict[str, bytes]:
        """Configuration and tokenizer for the deltas' folders; with ``pretrained`` only what is not the base's."""
        settings, model = self.settings, self.module
        with TemporaryDirectory() as folder:
            for name, content in model_config_file(model).items():
                (Path(folder) / name).write_bytes(content)
            parts: tuple[Any, ...] = (self.passes.trainer.processing_class, getattr(model, "generation_config", None))
            for part in parts:
                if hasattr(part, "save_pretrained"):
                    part.save_pretrained(folder)
            found: dict[str, Path | None] = dict(side_files(folder))
            if settings.pretrained is not None and Path(settings.pretrained).is_dir():
                found = changed_side_files(settings.pretrained, folder, settings.revision)
            return {name: path.read_bytes() for name, path in found.items() if path is not None}

    def _report(self, curves: list[QCurve]) -> None:
        """The table on the console, a plot of the curves, and the mean scores for the trainer's loggers."""
        settings, monitor, trainer = self.settings, self.passes.monitor, self.passes.trainer
        folders = [hf_folder(other, trainer) for other in pruning_callbacks(trainer)]
        prefix = prefix_of(self.folder, folders)
        trainer.log(mean_scores(self.rows.results, settings, monitor, prefix))
        if not self.passes.is_first:
            return
        console_table(self.rows.results, monitor)
        figures = save_plot_and_name_files(self.rows.results, curves, self.folder, settings, monitor)
        report = RunReport(self.rows.results, figures, prefix, trainer.state.global_step)
        show_run(boards_of_transformers(trainer.callback_handler.callbacks), report)


def _precision(arguments: TrainingArguments) -> str:
    """What a Trainer evaluates in while it trains; ``bf16_full_eval`` and its kin cast the model only outside."""
    named = ("bf16", "fp16")
    return next((name for name in named if getattr(arguments, name, False)), "float32")
