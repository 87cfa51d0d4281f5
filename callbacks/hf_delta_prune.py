"""HFDeltaPruneCallback: what DeltaPruneCallback does at the end of fit, in a Hugging Face ``Trainer``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpp_lightning.calibration.output_change import Measure, resolve_layer
from dpp_lightning.calibration.pieces import pieces_of
from dpp_lightning.calibration.teacher import CannotTrain
from dpp_lightning.callbacks.prune_run.base_weights import ASK_FOR_PRETRAINED, BaseWeights, has_weights, new_names
from dpp_lightning.callbacks.prune_run.calibration_data import measured_on, try_training
from dpp_lightning.callbacks.prune_run.evaluation_trial import check_evaluated_weights
from dpp_lightning.callbacks.prune_run.exchanged_models import can_be_pruned
from dpp_lightning.callbacks.prune_run.fit_notices import check_several, tell_earlier_run
from dpp_lightning.callbacks.prune_run.hf_base import check_base, settle_base
from dpp_lightning.callbacks.prune_run.hf_passes import HFForwardFn, HFPasses, calibration_batch
from dpp_lightning.callbacks.prune_run.hf_run import HFPruneRun
from dpp_lightning.callbacks.prune_run.hf_trainer_checks import (
    check_hf_trainer,
    go_last,
    hf_folder,
    pruning_callbacks,
)
from dpp_lightning.callbacks.prune_run.hub_upload import check_can_upload
from dpp_lightning.callbacks.prune_run.lora_view import AdapterView, adapter_view, find_adapter
from dpp_lightning.callbacks.prune_run.progress import RESULTS_FILE, Reporter
from dpp_lightning.callbacks.prune_run.rows_bar import rows_reporter
from dpp_lightning.callbacks.prune_run.scope_checks import check_inputs, check_methods, tensors_to_prune
from dpp_lightning.callbacks.prune_run.settings import SAMPLES, PruneSettings, as_tuple
from dpp_lightning.callbacks.prune_run.trainer_checks import warn_of_direction
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.run_lock import alone_in
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.atomic_write import check_writable
from dpp_lightning.tensors.names import buffer_names

_ATTACH = "prune = HFDeltaPruneCallback(...); prune.attach(trainer); trainer.train()"


class HFDeltaPruneCallback(TrainerCallback):
    """Prune the delta (fine-tuned minus base weights) at the end of ``Trainer.train`` and score every pruned model.

    For each method, rate and mask seed: prune, find q where the method searches it, run ``Trainer.evaluate``, save a
    delta folder with configuration and tokenizer. Then the fine-tuned weights are put back bit for bit, unless
    ``apply=True``. With ``load_best_model_at_end`` the best model's weights are pruned, which the trainer holds then.
    The trainer is not told to its callbacks, so give it by :meth:`attach`::

        prune = HFDeltaPruneCallback(method="darex-q", pruning_rate=[0.9, 0.99], monitor="eval_accuracy")
        prune.attach(trainer)
        trainer.train()

    The passes leave the trainer's state (best metric, log history, step) as it is, and no other callback acts in them.
    At the end the trainer's loggers get ``dpp/{method}/{rate}/{monitor}`` (mean over seeds) and ``…_std``. What lies in
    ``output_dir`` is as with :class:`~dpp_lightning.callbacks.DeltaPruneCallback`. Several callbacks in one trainer
    need an ``output_dir`` each. Under DDP (``torchrun``, ``accelerate launch``) all processes prune and score together,
    and the first one writes.

    Training that resumes from a checkpoint finds its base again if this callback is attached in both trainings while
    the model holds the base: the checkpoint's ``trainer_state.json`` has the base's fingerprint, which is compared.

    Args:
        method: one or several names of ``METHODS``.
        pruning_rate: one or several fractions of the delta that are dropped, in [0, 1).
        seeds: one or several mask seeds.
        monitor: the metric of ``Trainer.evaluate`` that is the score, with or without ``eval_``.
        mode: whether ``max`` or ``min`` is best.
        output_dir: default: ``deltas`` in the trainer's ``output_dir``. An earlier run in it is moved into a folder
            ``earlier-1`` there, and so on.
        pretrained: folder or hub id of the base; default the values that the model has when training begins, or when
            the callback was attached if training resumes. What it lacks, such as a new head, is carried.
        revision: branch, tag or commit of a hub id.
        objective: what q is searched by: ``output_change`` (no labels) or ``metric`` on ``calibration_dataset``.
        calibration_samples: how many items are taken for calibration; default 64, 512 for methods that train
            (``refit``, ``lowrank``), 1024 for ``auto``.
        calibration_dataset: items as the trainer's other data sets have them; default the training data.
        output_layer: name of the submodule whose output is compared; default the model's logits.
        output_measure: see ``DeltaPruneCallback``.
        forward_fn: (model, batch) to logits, for a model that returns none when called with the batch's items.
        scope, include, exclude, outside, carry, blocks: which tensors are pruned, see
            :class:`dpp_lightning.pruning.scope.Scope`. Buffers are carried. Without ``pretrained`` a head that
            ``from_pretrained`` has just made is part of the base; name it with ``carry`` so that the deltas apply to
            the published checkpoint.
        dtype: of the kept values in the files; default the model's.
        method_settings: a method's own settings under its name.
        apply: leave the pruned model (one method, rate and seed) in the trainer.
        plot: also plot score and output change over q for each rate, ``q_curve.png``: True for the first method, or a
            method's name.
        resume: keep the rows that ``results.jsonl`` has of the same weights and settings, and make the others. The file
            of another run is refused.
        save_deltas: write delta folders; ``results.jsonl`` is written anyhow.
        lora: how a PEFT model is pruned: ``adapter`` or ``merged``, see ``DeltaPruneCallback``.
        push_to_hub, hub_private: upload the delta folders to the hub at the end, see ``DeltaPruneCallback``.

    Attributes:
        settings: the arguments, checked.
        results: a row for the base, the fine-tuned and each pruned model.
        reporter: is called with every row as it is made; may be replaced before training. Default: a bar over the rows
            on a terminal, or a line for each elsewhere and where the trainer shows no bars (``disable_tqdm``).

    Raises:
        ValueError: at construction or before the first step, if the settings contradict each other, the trainer was not
            attached, the metric is not evaluated, calibration data cannot be had, training resumes from a base that
            nothing tells, weights are in shards (FSDP, DeepSpeed) or cannot be pruned, two callbacks share a folder, or
            an upload is bound to fail.
    """

    def __init__(
        self,
        method: str | Sequence[str] = "darex-q",
        pruning_rate: float | Sequence[float] = 0.9,
        seeds: int | Sequence[int] = 0,
        monitor: str = "eval_accuracy",
        mode: Literal["max", "min"] = "max",
        output_dir: str | None = None,
        pretrained: str | None = None,
        revision: str | None = None,
        objective: Literal["output_change", "metric"] = "output_change",
        calibration_samples: int | None = None,
        calibration_dataset: Any = None,
        output_layer: str | None = None,
        output_measure: Measure = "mean",
        forward_fn: HFForwardFn | None = None,
        scope: Literal["all", "linear"] = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Literal["carry", "revert"] = "carry",
        carry: Sequence[str] = (),
        blocks: Sequence[str] = (),
        dtype: Literal["float32", "bfloat16", "float16", "int8", "int4", "int3", "int2"] | None = None,
        method_settings: dict[str, dict[str, str | float]] | None = None,
        apply: bool = False,
        plot: bool | str = False,
        resume: bool = False,
        save_deltas: bool = True,
        lora: AdapterView | None = None,
        push_to_hub: str | None = None,
        hub_private: bool | None = None,
    ) -> None:
        self.settings = PruneSettings(
            methods=as_tuple(method), rates=tuple(map(float, as_tuple(pruning_rate))), seeds=as_tuple(seeds),
            monitor=monitor, mode=mode, output_dir=output_dir, pretrained=pretrained, revision=revision,
            objective=objective, calibration_samples=calibration_samples, calibration_dataloader=None,
            output_layer=output_layer, output_measure=output_measure, forward_fn=forward_fn,
            scope=Scope.of(scope, include, exclude, outside, carry, blocks), dtype=dtype,
            method_settings=method_settings or {}, apply=apply, ckpt="last", plot=plot, resume=resume,
            save_deltas=save_deltas, lora=lora, push_to_hub=push_to_hub, hub_private=hub_private,
            callback="HFDeltaPruneCallback",
        )  # fmt: skip
        self.calibration_dataset = calibration_dataset
        if objective == "metric" and calibration_dataset is None and self.settings.fits:
            raise ValueError(
                "objective='metric' needs labelled data that was neither trained on nor is scored: pass "
                "calibration_dataset=, or take objective='output_change' (no labels)"
            )
        self.reporter: Reporter | None = None
        self.results: list[Result] = []
        self._trainer: Trainer | None = None
        self._base: BaseWeights | None = None  # of the training that goes on; before, what the model was attached with
        self._trained: weakref.ref[nn.Module] | None = None  # the model of the last training that began
        self._goes_on = False
        self._batch: Any = None
        self._source = ""

    def attach(self, trainer: Trainer) -> HFDeltaPruneCallback:
        """Tell this callback its trainer, and the trainer this callback if it does not have it.

        Args:
            trainer: not yet in training.

        Returns:
            This callback.
        """
        self._trainer, self._base, self._goes_on = trainer, None, False
        if self.settings.pretrained is None and has_weights(self._model):
            self._base = BaseWeights.from_module(self._model)
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.callback_handler.callbacks.append(self)  # add_callback warns of a second one of a class
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the base and check all that can be checked before the first step."""
        if self._trainer is None:
            raise ValueError(f"HFDeltaPruneCallback does not know its trainer; write {_ATTACH}")
        trainer, settings = self._trainer, self.settings
        if trainer.args.world_size > 1:  # a launcher may have started this process after Lightning looked for its rank
            rank_zero_only.rank = trainer.args.process_index  # type: ignore[attr-defined]
        check_hf_trainer(trainer, settings, state)
        warn_of_direction(settings)
        self._check_output(trainer)
        go_last(trainer, self)
        model, optimizers = self._model, self._optimizers()
        find_adapter(model, settings.lora)
        self._take_base(model, state)
        with self._adapter_view() as base:
            check_base(base, model, new_names(model, optimizers), settings, state)
            check_methods(settings, self._scope(), self._to_prune(base))
            passes = self._passes()
            passes.check_monitor()
            check_evaluated_weights(self._model, passes.score_first)
            self._take_calibration_data(passes, base)
        self._goes_on = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, calibrate, score, save; then put the fine-tuned weights back."""
        assert self._base is not None
        assert self._trainer is not None
        for optimizer in self._optimizers():
            if callable(getattr(optimizer, "eval", None)):  # a schedule-free one, whose weights for evaluation differ
                optimizer.eval()
        self._base.convert_like(self._model)
        try:
            self._prune()
        except KeyboardInterrupt:
            rank_zero_warn(
                "pruning was stopped; the deltas finished so far are in "
                f"{hf_folder(self.settings, self._trainer)}, and the model holds the fine-tuned weights"
            )
            raise
        finally:
            self._base, self._goes_on = None, False

    def _prune(self) -> None:
        assert self._trainer is not None
        settings = self.settings
        with self._adapter_view(keep=settings.apply) as base:
            new = new_names(self._model, self._optimizers())
            scope = self._scope()
            if not can_be_pruned(base, self._model, scope, settings.callback):
                return
            labelled = self.calibration_dataset if settings.fits and settings.objective == "metric" else None
            passes, folder = self._passes(), hf_folder(settings, self._trainer)
            check_evaluated_weights(self._model, passes.score_first)
            shown = passes.is_first and not self._trainer.args.disable_tqdm
            alone = alone_in(folder, rank_zero_warn) if passes.is_first else nullcontext()
            with alone, rows_reporter(self.reporter, shown=shown) as reporter:
                self._trainer.accelerator.wait_for_everyone()
                run = HFPruneRun(
                    settings, passes, base, scope, new, self._batch, labelled, self._source,
                    folder, reporter,
                )  # fmt: skip
                self.results = run.run()

    @property
    def _model(self) -> nn.Module:
        assert self._trainer is not None
        model: Any = self._trainer.model
        return cast(nn.Module, model)

    def _take_base(self, model: nn.Module, state: TrainerState) -> None:
        """Settle the base, and say where it is what an earlier training left in the model."""
        settings, optimizers = self.settings, self._optimizers()
        again = self._trained is not None and self._trained() is model
        goes_on = self._goes_on and again
        kept = self._base if goes_on or state.global_step else None
        self._base, self._trained, self._goes_on = None, weakref.ref(model), False
        if again and not state.global_step and settings.pretrained is None:
            rank_zero_info(
                "the earlier training did not end: its base is that of this one too"
                if goes_on
                else "the base of this training is what the earlier one left in the model, not the base of that one; "
                f"{ASK_FOR_PRETRAINED} keeps one base for both"
            )
        self._base = settle_base(model, settings, state, optimizers, kept, goes_on=goes_on)

    def _optimizers(self) -> list[Any]:
        """The trainer's optimizer, without accelerate's wrapper."""
        assert self._trainer is not None
        optimizer = self._trainer.optimizer
        return [] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)]

    def _passes(self) -> HFPasses:
        assert self._trainer is not None
        settings = self.settings
        layer = settings.output_layer and settings.output_layer_of(self._model)
        forward_fn: Any = settings.forward_fn
        return HFPasses(self._trainer, settings.monitor, forward_fn, layer)

    def _adapter_view(self, *, keep: bool = False) -> AbstractContextManager[BaseWeights]:
        assert self._base is not None
        return adapter_view(self._model, self._base, self.settings.lora, keep=keep)

    def _scope(self) -> Scope:
        """The scope with buffers, and heads that were new in this training, carried."""
        model = self._model
        return self.settings.scope.carrying(new_names(model, self._optimizers()) | buffer_names(model))

    def _to_prune(self, base: BaseWeights) -> dict[str, Tensor]:
        return tensors_to_prune(self._scope(), base.tensors, self._model, frozen=self.settings.lora == "merged")

    def _check_output(self, trainer: Trainer) -> None:
        """Refuse a folder that cannot be written or that another callback writes into, and an upload that must fail."""
        settings, several = self.settings, pruning_callbacks(trainer)
        check_several(several, [hf_folder(other, trainer) for other in several])
        if not trainer.is_world_process_zero():
            return
        folder = hf_folder(settings, trainer)
        check_writable(folder)
        if not settings.resume:
            tell_earlier_run(folder, RESULTS_FILE)
        if settings.push_to_hub is not None:
            check_can_upload()

    def _take_calibration_data(self, passes: HFPasses, base: BaseWeights) -> None:
        """Take and try the data that the methods need, so that what is wrong with it is known now."""
        settings = self.settings
        self._batch, self._source = None, ""
        if settings.fits and settings.objective == "metric":
            self._source = "calibration_dataset"
        by_change = settings.fits and settings.objective == "output_change"
        if not (by_change or settings.plot or settings.needs_inputs or settings.needs_batch):
            return
        self._batch, source = calibration_batch(passes.trainer, self.calibration_dataset, settings.samples)
        self._source = self._source or source
        if passes.output_layer is not None:
            resolve_layer(passes.module, passes.output_layer)
        try:
            passes.outputs(measured_on(self._batch), lambda _, output: output)
            if settings.methods_with_gradients:
                passes.output_gradients(measured_on(self._batch))
            if settings.methods_that_train:
                try_training(lambda some: passes.distillation(some, settings.scope.blocks), self._batch, settings)
            inputs = passes.layer_inputs([measured_on(self._batch)]) if settings.needs_inputs else {}
        except CannotTrain:  # whatever the data
            raise
        except Exception as error:  # of the user's model, in any way
            fault = " ".join(str(error).split())
            cure = (
                ""
                if "forward_fn" in fault
                else "; if the model is not called with a batch's items, pass forward_fn=(model, batch) -> logits"
            )
            raise ValueError(
                f"the calibration batch ({source}) cannot be used: {type(error).__name__}: {fault}{cure}"
            ) from error
        whole = self._batch
        check_inputs(
            settings, self._scope(), self._to_prune(base), inputs,
            lambda: passes.layer_inputs(pieces_of(whole, SAMPLES)),
        )  # fmt: skip
