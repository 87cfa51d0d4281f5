"""One run of the callback: prune, calibrate, score and save on the weights a trainer holds, then put them back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from dpp_lightning.calibration.output_change import OutputChange
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.calibration_data import calibration_batch, labelled_loader
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses, read_monitor
from dpp_lightning.callbacks.prune_run.hub_config import hub_config
from dpp_lightning.callbacks.prune_run.lora_view import ADAPTER_FOLDER, find_adapter, save_adapter
from dpp_lightning.callbacks.prune_run.run_identity import check_score, run_identity
from dpp_lightning.experiments.grid import Experiment, QCurve, Result, mean_and_deviation
from dpp_lightning.experiments.plots import plot_over_q
from dpp_lightning.experiments.results import ResultsLog, grid, rows_of
from dpp_lightning.experiments.tables import console_table
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.registry import get_method
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.tensors.names import canonical_tensors, saved_names

if TYPE_CHECKING:
    from dpp_lightning.callbacks.delta_prune import DeltaPruneCallback

RESULTS_FILE, PLOT_FILE, PLOT_POINTS = "results.jsonl", "q_curve.png", 12


class PruneRun:
    """The state of one run.

    Args:
        settings: the callback.
        trainer: in ``on_train_end``, ``on_validation_end`` or ``on_test_end``.
        module: holds the fine-tuned weights.
        base: theta_0.
        scope: with new heads carried.
        folder: for deltas, ``results.jsonl`` and the plot.
    """

    def __init__(
        self,
        settings: DeltaPruneCallback,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        base: BaseWeights,
        scope: Scope,
        folder: Path,
    ) -> None:
        self.settings, self.trainer, self.module, self.base = settings, trainer, module, base
        self.scope, self.folder = scope, folder
        self.passes = EvaluationPasses(trainer, settings.monitor)
        rows = {name: get_method(name) for name in settings.methods}
        searches = any(row.fit is not None for row in rows.values())
        self.needs_inputs = any(row.needs_inputs(settings.method_settings.get(n, {})) for n, row in rows.items())
        self.learns = any(row.fit is not None and row.fit.needs_gradients for row in rows.values())
        self.labelled, self.source = None, ""
        self.batch = None
        compares = settings.plot or (searches and settings.objective == "output_change")
        if compares or self.needs_inputs or self.learns:
            self.batch, self.source = calibration_batch(
                trainer, settings.calibration_dataloader, settings.calibration_samples
            )
        self.change: OutputChange | None = None
        if self.batch is not None:
            outputs = partial(self.passes.outputs, self.batch, settings.layer(module), settings.forward_fn)
            self.change = OutputChange(outputs, settings.output_measure)
        if searches and settings.objective == "metric":
            self.labelled, self.source = labelled_loader(trainer, settings.calibration_dataloader)
        self.inputs: dict[str, InputStatistics] = {}
        self.learner: BatchGradients | None = None
        own = {name: settings.method_settings.get(name, {}) for name in settings.methods}
        identity = run_identity(settings, module, base, self.passes)
        self.log = ResultsLog(folder / RESULTS_FILE, self.passes.monitor, identity, own)
        self.results: list[Result] = self.log.resume() if settings.resume else []
        self.done = rows_of(self.results)

    def run(self) -> list[Result]:
        """Do it; the module holds the fine-tuned weights again afterwards, bit for bit, unless ``apply``."""
        settings, module = self.settings, self.module
        pending = [row for row in grid(settings.methods, settings.rates, settings.seeds) if row not in self.done]
        self._check_resumed()
        settings.reporter.begin(pending, len(self.done))
        if not pending and not settings.plot and len(self.results) >= 2:
            self._report([])
            return self.results
        if self.change is not None:
            self.change.take_reference()
        if self.needs_inputs:
            self.inputs = self.passes.inputs(self.batch, settings.forward_fn)
        if self.learns:
            self.learner = self.passes.learner(self.batch, settings.forward_fn)
        finetuned = self._known("fine-tuned") or Result("fine-tuned", self.passes.score(), split=self.passes.split)
        fates = self.scope.fates(self.base.tensors, canonical_tensors(module))
        moved = [name for name, fate in fates.items() if fate != "carry"]
        self._tell_carried([name for name, fate in fates.items() if fate == "carry"])
        with self.base.exchanged(module, moved):
            experiment = self._experiment(self._plan(moved))
            self._reference_rows(experiment, finetuned)
            for result in experiment.run(settings.methods, settings.rates, settings.seeds):
                self._save_adapter(experiment, result)
                self._record(result)
            curves = self._curves(experiment) if settings.plot else []
        if settings.apply and experiment.last is not None:
            own = canonical_tensors(module)
            with torch.no_grad():
                for name in moved:
                    own[name].copy_(self.base.tensors[name])
            experiment.last.apply_(module, force=True)
        self._report(curves)
        return self.results

    def _tell_carried(self, names: list[str]) -> None:
        """What every delta holds besides pruned tensors; a decoder's embeddings may be most of its bytes."""
        if names:
            own = canonical_tensors(self.module)
            size = sum(own[name].numel() * own[name].element_size() for name in names)
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            rank_zero_info(f"stored dense in every delta, {size:,} bytes: {shown}")

    def _plan(self, moved: list[str]) -> PruningPlan:
        """The pair of models while they are exchanged: the module holds theta_0 where a tensor was moved."""
        own, held = canonical_tensors(self.module), self.base.tensors
        base = {**held, **{name: own[name] for name in moved}}
        finetuned = {**own, **{name: held[name] for name in moved}}
        name = self.settings.pretrained or getattr(self.module, "pretrained", None)
        revision = self.settings.revision or getattr(self.module, "revision", None)
        plan = PruningPlan.of(
            base,
            finetuned,
            self.scope,
            base_name=name,
            base_revision=revision,
            canonical=True,
            saved=saved_names(self.module, exact=False),
        )
        return plan.with_inputs(self.inputs) if self.inputs else plan

    def _change(self) -> float:
        """The first rank's output change on all ranks, as rounding could make their searches part."""
        assert self.change is not None
        return float(self.trainer.strategy.broadcast(self.change()))

    def _experiment(self, plan: PruningPlan) -> Experiment:
        labelled = self.labelled
        return Experiment(
            plan=plan,
            target=self.module,
            score=self.passes.score,
            change=self._change if self.change is not None else None,
            metric=(lambda: self.passes.score(labelled)) if labelled is not None else None,
            gradients=self.learner,
            objective=self.settings.objective,
            higher_is_better=self.settings.mode == "max",
            folder=self.folder if self.trainer.is_global_zero and self.settings.save_deltas else None,
            dtype=self.settings.dtype,
            method_settings=self.settings.method_settings,
            split=self.passes.split,
            q_split=self.source,
            side_files=hub_config(self.module),
            done=self.done,
        )

    def _known(self, reference: str) -> Result | None:
        """The row of the base or the fine-tuned model, if an earlier run made it."""
        return next((r for r in self.results if r.method == reference), None)

    def _check_resumed(self) -> None:
        """Outside a fit the trainer has just scored the fine-tuned model: it must score as it did."""
        before = self._known("fine-tuned")
        if before is not None and self.trainer.state.fn != TrainerFn.FITTING:
            now = read_monitor(self.trainer.callback_metrics, self.passes.monitor)
            check_score(before.score, now, self.passes.monitor, self.log.path)

    def _reference_rows(self, experiment: Experiment, finetuned: Result) -> None:
        """The base (all of the delta dropped, carried tensors kept) and the fine-tuned model, unpruned."""
        base = self._known("base") or Result("base", self.passes.score(), split=self.passes.split)
        experiment.card = {"base": base.score, "fine-tuned": finetuned.score}
        dense = total_bytes(experiment.plan.finetuned)
        for row in (base, replace(finetuned, density=1.0, num_bytes=dense, ratio=1.0)):
            if self._known(row.method) is None:
                self._record(row)

    def _save_adapter(self, experiment: Experiment, result: Result) -> None:
        """The pruned adapter as a PEFT folder inside the delta's."""
        adapter = find_adapter(self.module)
        if adapter is None or self.settings.lora == "merged" or experiment.folder is None:
            return
        assert experiment.last is not None
        assert result.folder is not None
        with experiment.last.applied(self.module, force=True):
            save_adapter(adapter, experiment.folder / result.folder / ADAPTER_FOLDER)

    def _record(self, result: Result) -> None:
        """One more row: written at once, so that a run that is cut short leaves it, and told."""
        if not self.settings.save_deltas:
            result = replace(result, folder=None)
        self.results.append(result)
        if self.trainer.is_global_zero:
            self.log.append(result)
        self.settings.reporter.row(result, self.passes.monitor)

    def _curves(self, experiment: Experiment) -> list[QCurve]:
        """Fig. 1 for every rate, on the first seed, with the q that was chosen if one was searched."""
        curves = []
        for rate in self.settings.rates:
            rows = [r for r in self.results if r.pruning_rate == rate]
            if isinstance(self.settings.plot, str):
                rows = [r for r in rows if r.method == self.settings.plot]
            chosen = next((r.q for r in rows if (fit := get_method(r.method).fit) is not None and fit.one_q), None)
            curves.append(experiment.curve(rows[0].method, rate, self.settings.seeds[0], PLOT_POINTS, chosen))
        return curves

    def _report(self, curves: list[QCurve]) -> None:
        """Table, plot, loggers and ``callback_metrics``."""
        metrics: dict[str, float] = {}
        for method in self.settings.methods:
            for rate in self.settings.rates:
                scores = [r.score for r in self.results if r.method == method and r.pruning_rate == rate]
                key = f"dpp/{method}/{rate:g}/{self.passes.monitor}"
                metrics[key], metrics[f"{key}_std"] = mean_and_deviation(scores)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
            logger.save()
        if not self.trainer.is_global_zero:
            return
        console_table(self.results, self.passes.monitor)
        if curves:
            base, finetuned = (row.score for row in self.results[:2])
            plot_over_q(curves, self.folder / PLOT_FILE, monitor=self.passes.monitor, finetuned=finetuned, base=base)
        what = f"deltas and {RESULTS_FILE}" if self.settings.save_deltas else RESULTS_FILE
        rank_zero_info(f"{what} are in {self.folder}")
