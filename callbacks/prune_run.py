"""One run of the callback: prune, calibrate, score and save on the weights a trainer holds, then put them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from dpp_lightning.atomic import whole_file
from dpp_lightning.callbacks.base_weights import BaseWeights
from dpp_lightning.callbacks.calibration_data import calibration_batch, labelled_loader
from dpp_lightning.callbacks.hub_config import hub_config
from dpp_lightning.callbacks.passes import Passes
from dpp_lightning.checkpoints import total_bytes
from dpp_lightning.experiment import Experiment, QCurve, Result, mean_and_deviation
from dpp_lightning.methods import get_method
from dpp_lightning.names import canonical_tensors, saved_names
from dpp_lightning.plan import PruningPlan
from dpp_lightning.report import console_table, plot_over_q
from dpp_lightning.scope import Scope

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
        self.passes = Passes(trainer, settings.monitor)
        self.layer = settings.layer(module)
        searches = any(get_method(m).searches_q for m in settings.methods)
        self.labelled, self.source = None, ""
        self.batch = None
        if settings.plot or (searches and settings.objective == "output_change"):
            self.batch, self.source = calibration_batch(
                trainer, settings.calibration_dataloader, settings.calibration_samples
            )
        if searches and settings.objective == "metric":
            self.labelled, self.source = labelled_loader(trainer, settings.calibration_dataloader)
        self.results: list[Result] = []

    def run(self) -> list[Result]:
        """Do it; the module holds the fine-tuned weights again afterwards, bit for bit, unless ``apply``."""
        settings, module = self.settings, self.module
        reference = self._outputs() if self.batch is not None else []
        finetuned = self.passes.score()
        fates = self.scope.fates(self.base.tensors, canonical_tensors(module))
        moved = [name for name, fate in fates.items() if fate != "carry"]
        with self.base.exchanged(module, moved):
            experiment = self._experiment(self._plan(moved), reference)
            self._reference_rows(experiment, finetuned)
            for result in experiment.run(settings.methods, settings.rates, settings.seeds):
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

    def _outputs(self) -> list[torch.Tensor]:
        return self.passes.outputs(self.batch, self.layer, self.settings.forward_fn)

    def _plan(self, moved: list[str]) -> PruningPlan:
        """The pair of models while they are exchanged: the module holds theta_0 where a tensor was moved."""
        own, held = canonical_tensors(self.module), self.base.tensors
        base = {**held, **{name: own[name] for name in moved}}
        finetuned = {**own, **{name: held[name] for name in moved}}
        name = self.settings.pretrained or getattr(self.module, "pretrained", None)
        revision = self.settings.revision or getattr(self.module, "revision", None)
        return PruningPlan.of(
            base,
            finetuned,
            self.scope,
            base_name=name,
            base_revision=revision,
            canonical=True,
            saved=saved_names(self.module, exact=False),
        )

    def _experiment(self, plan: PruningPlan, reference: list[torch.Tensor]) -> Experiment:
        labelled = self.labelled
        return Experiment(
            plan=plan,
            target=self.module,
            score=self.passes.score,
            outputs=self._outputs if self.batch is not None else None,
            reference=reference,
            metric=(lambda: self.passes.score(labelled)) if labelled is not None else None,
            objective=self.settings.objective,
            higher_is_better=self.settings.mode == "max",
            folder=self.folder if self.trainer.is_global_zero else None,
            dtype=self.settings.dtype,
            method_settings=self.settings.method_settings,
            split=self.passes.split,
            q_split=self.source,
            side_files=hub_config(self.module),
        )

    def _reference_rows(self, experiment: Experiment, finetuned: float) -> None:
        """The base (all of the delta dropped, carried tensors kept) and the fine-tuned model, unpruned."""
        dense = total_bytes(experiment.plan.finetuned)
        split, base = self.passes.split, self.passes.score()
        experiment.card = {"base": base, "fine-tuned": finetuned}
        self._record(Result("base", base, split=split))
        self._record(Result("fine-tuned", finetuned, density=1.0, num_bytes=dense, ratio=1.0, split=split))

    def _record(self, result: Result) -> None:
        """One more row: told, and written with all others so far, so that a run that is cut short leaves them."""
        self.results.append(result)
        what = (
            f"{result.method} p={result.pruning_rate:g} seed={result.seed} q={result.q:.4g}"
            if result.q
            else result.method
        )
        rank_zero_info(f"{what}: {self.passes.monitor} {result.score:.4f} ({result.seconds:.1f} s)")
        if self.trainer.is_global_zero:
            with whole_file(self.folder / RESULTS_FILE) as temporary:
                rows = (json.dumps({**r.to_json(), "monitor": self.passes.monitor}) + "\n" for r in self.results)
                temporary.write_text("".join(rows))

    def _curves(self, experiment: Experiment) -> list[QCurve]:
        """Fig. 1 for every rate, on the first seed, with the q that was chosen if one was searched."""
        curves = []
        for rate in self.settings.rates:
            rows = [r for r in self.results if r.pruning_rate == rate]
            chosen = next((r.q for r in rows if get_method(r.method).searches_q), None)
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
            base, finetuned = self.results[0].score, self.results[1].score
            plot_over_q(curves, self.folder / PLOT_FILE, monitor=self.passes.monitor, finetuned=finetuned, base=base)
        rank_zero_info(f"deltas and {RESULTS_FILE} are in {self.folder}")
