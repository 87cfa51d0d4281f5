"""One run of the callback: the weights that a trainer holds are pruned, scored and saved, and then put back."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights, declared, new_names
from dpp_lightning.callbacks.prune_run.calibration_data import CalibrationData, CalibrationPasses
from dpp_lightning.callbacks.prune_run.evaluation import (
    EvaluationPasses,
    callbacks_act_in_validation,
    read_monitor,
    warn_of_several_loaders,
)
from dpp_lightning.callbacks.prune_run.exchanged_models import exchanged_plan, leave_pruned
from dpp_lightning.callbacks.prune_run.model_config import model_config_file
from dpp_lightning.callbacks.prune_run.progress import RESULTS_FILE, Reporter, report_carried, report_results
from dpp_lightning.callbacks.prune_run.run_identity import check_score, run_identity
from dpp_lightning.callbacks.prune_run.run_rows import RunRows
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.callbacks.prune_run.shared_turns import Shared
from dpp_lightning.callbacks.prune_run.turns import Alone, Turns
from dpp_lightning.experiments.grid import Experiment, QCurve, Result
from dpp_lightning.experiments.results import ResultsLog
from dpp_lightning.experiments.sweep_worker import Worker
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.tensors.names import canonical_tensors


class PruneRun:
    """One run. All ranks make it together; rank 0 writes.

    Args:
        settings: of the callback.
        trainer: in ``on_train_end``, ``on_validation_end`` or ``on_test_end``; its module holds the fine-tuned weights.
        base: theta_0.
        scope: the settings' scope with new heads carried.
        calibration: what the settings need of it.
        folder: for the deltas, ``results.jsonl`` and the plot.
        reporter: is called with every row as it is made.
        worker: of this process, where several share the rows; the first rank has entered.
    """

    def __init__(
        self,
        settings: PruneSettings,
        trainer: pl.Trainer,
        base: BaseWeights,
        scope: Scope,
        calibration: CalibrationData,
        folder: Path,
        reporter: Reporter,
        worker: Worker | None = None,
    ) -> None:
        self.settings, self.trainer, self.base, self.scope = settings, trainer, base, scope
        self.folder, self.reporter, self.worker = folder, reporter, worker
        self.module = trainer.lightning_module
        self.passes = EvaluationPasses(trainer, settings.monitor)
        self.calibration = CalibrationPasses(settings, self.passes, calibration)
        method_settings = {name: settings.method_settings.get(name, {}) for name in settings.methods}
        new = new_names(self.module, trainer.optimizers)
        identity = run_identity(
            settings, base, self.module, new, self.passes.monitor, self.passes.split,
            precision=str(trainer.precision),
            limit=trainer.limit_test_batches if self.passes.testing else trainer.limit_val_batches,
            data=trainer.datamodule,  # type: ignore[attr-defined]
        )  # fmt: skip
        self.log = ResultsLog(folder / RESULTS_FILE, self.passes.monitor, identity, method_settings)
        turns: Turns
        if worker is not None:
            turns = Shared(self.log, worker, self.passes, reporter.note)
        else:
            writes = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
            turns = Alone(self.log, self.passes, resume=settings.resume, writes=writes)
        self.rows = RunRows(settings, self.module, self.passes, turns, reporter)

    def run(self) -> list[Result]:
        """Make the rows that are missing, or those of them that no other worker makes, and report all of them.

        Afterwards the module holds the fine-tuned weights again, bit for bit, unless ``apply`` is set.

        Returns:
            The rows of base and fine-tuned model, then of the pruned ones, those of an earlier run and of other workers
            included.

        Raises:
            ValueError: if another run's rows are there, which are to be kept.
        """
        settings = self.settings
        self.rows.begin()
        self._check_resumed_score()
        if self.worker is not None and self.worker.entered:
            self.worker.begin()
        pending = self.rows.pending()
        self.reporter.begin(pending, len(self.rows.done))
        curves: list[QCurve] = []
        if pending or settings.plot or len(self.rows.results) < 2:
            curves = self._make_rows()
        if self.rows.reports:
            report_results(self.rows.results, curves, self.folder, settings, self.trainer, self.passes.monitor)
        return self.rows.results

    def _make_rows(self) -> list[QCurve]:
        """Score the fine-tuned model, the base and every pruned model; curves over q if a plot is asked for."""
        settings = self.settings
        self.calibration.measure_finetuned()
        finetuned = self.rows.reference("fine-tuned")
        if self.trainer.state.fn != TrainerFn.FITTING:  # a fit tells it before training
            warn_of_several_loaders(self.passes, self.settings.monitor)
        tensors = canonical_tensors(self.module)
        fates = self.scope.fates(self.base.tensors, tensors)
        replaced = [name for name, fate in fates.items() if fate != "carry"]
        with self.base.exchanged(self.module, replaced):
            plan = self._plan(replaced)
            report_carried(plan.carried, self.reporter)
            experiment = self._experiment(plan)
            curves = self.rows.make(experiment, finetuned)
        if settings.apply:
            assert experiment.last is not None  # apply is not combined with resume, so a row was made
            leave_pruned(self.module, self.base, replaced, experiment.last)
        return curves

    def _plan(self, replaced: list[str]) -> PruningPlan:
        """Both models, while the module holds theta_0 of the replaced tensors and ``self.base`` the fine-tuned ones."""
        plan = exchanged_plan(
            self.module,
            self.base,
            replaced,
            self.scope,
            self.settings.pretrained or declared(self.module, "pretrained"),
            self.settings.revision or declared(self.module, "revision"),
        )
        return self.calibration.with_inputs(plan)

    def _experiment(self, plan: PruningPlan) -> Experiment:
        settings, saves = self.settings, self.trainer.is_global_zero and self.settings.save_deltas
        return Experiment(
            plan=plan,
            target=self.module,
            score=self.passes.score,
            change=self.calibration.output_change,
            metric=self.calibration.metric,
            gradients=self.calibration.gradients,
            distillation=self.calibration.distillation,
            objective=settings.objective,
            higher_is_better=settings.mode == "max",
            folder=self.folder if saves else None,
            dtype=settings.dtype,
            method_settings=settings.method_settings,
            split=self.passes.split,
            q_split=self.calibration.source,
            side_files=model_config_file(self.module),
            monitor=self.passes.monitor,
        )

    def _check_resumed_score(self) -> None:
        """Outside a fit the trainer has just scored the fine-tuned model: the score must be that of the earlier run."""
        before = self.rows.resumed("fine-tuned")
        if before is not None and self.trainer.state.fn != TrainerFn.FITTING:
            # a callback that acts in an evaluation may have had other weights scored
            acted = callbacks_act_in_validation(self.trainer)
            now = self.passes.score() if acted else read_monitor(self.trainer.callback_metrics, self.passes.monitor)
            check_score(before.score, now, self.passes.monitor, self.log.path)
