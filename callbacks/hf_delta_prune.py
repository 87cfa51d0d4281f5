"""HFDeltaPruneCallback: what DeltaPruneCallback does at the end of fit, in a Hugging Face ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dpp_lightning.calibration.output_change import Measure, resolve_layer
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights, has_weights, new_names
from dpp_lightning.callbacks.prune_run.exchanged_models import can_be_pruned
from dpp_lightning.callbacks.prune_run.fit_notices import tell_earlier_run
from dpp_lightning.callbacks.prune_run.hf_passes import HFForwardFn, HFPasses, calibration_batch
from dpp_lightning.callbacks.prune_run.hf_run import HFPruneRun
from dpp_lightning.callbacks.prune_run.lora_view import AdapterView, adapter_view, find_adapter
from dpp_lightning.callbacks.prune_run.progress import RESULTS_FILE, LogReporter, Reporter
from dpp_lightning.callbacks.prune_run.settings import PruneSettings, as_tuple
from dpp_lightning.callbacks.prune_run.trainer_checks import warn_of_direction
from dpp_lightning.experiments.grid import Result
from dpp_lightning.methods.block_checks import check_method
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.atomic_write import check_writable
from dpp_lightning.tensors.names import buffer_names, canonical_tensors

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
    ``output_dir`` is as with :class:`~dpp_lightning.callbacks.DeltaPruneCallback`.

    Args:
        method: one or several names of ``METHODS``.
        pruning_rate: one or several fractions of the delta that are dropped, in [0, 1).
        seeds: one or several mask seeds.
        monitor: the metric of ``Trainer.evaluate`` that is the score, with or without ``eval_``.
        mode: whether ``max`` or ``min`` is best.
        output_dir: default: ``deltas`` in the trainer's ``output_dir``. An earlier run in it is moved into a folder
            ``earlier-1`` there, and so on.
        pretrained: folder or hub id of the base; default the values that the model has when training begins. Training
            that resumes from a checkpoint needs it. What that checkpoint lacks, such as a new head, is carried.
        revision: branch, tag or commit of a hub id.
        objective: what q is searched by: ``output_change`` (no labels) or ``metric`` on ``calibration_dataset``.
        calibration_samples: how many items the output change is measured on.
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
        save_deltas: write delta folders; ``results.jsonl`` is written anyhow.
        lora: how a PEFT model is pruned: ``adapter`` or ``merged``, see ``DeltaPruneCallback``.

    Attributes:
        settings: the arguments, checked.
        results: a row for the base, the fine-tuned and each pruned model.
        reporter: is called with every row as it is made; may be replaced before training.

    Raises:
        ValueError: at construction or before the first step, if the settings contradict each other, the trainer was not
            attached, the metric is not evaluated, calibration data cannot be had, training resumes without
            ``pretrained``, there are several processes, or weights cannot be pruned.
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
        calibration_samples: int = 64,
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
        dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None,
        method_settings: dict[str, dict[str, str | float]] | None = None,
        apply: bool = False,
        save_deltas: bool = True,
        lora: AdapterView | None = None,
    ) -> None:
        self.settings = PruneSettings(
            methods=as_tuple(method), rates=tuple(map(float, as_tuple(pruning_rate))), seeds=as_tuple(seeds),
            monitor=monitor, mode=mode, output_dir=output_dir, pretrained=pretrained, revision=revision,
            objective=objective, calibration_samples=calibration_samples, calibration_dataloader=None,
            output_layer=output_layer, output_measure=output_measure, forward_fn=forward_fn,
            scope=Scope.of(scope, include, exclude, outside, carry, blocks), dtype=dtype,
            method_settings=method_settings or {}, apply=apply, ckpt="last", plot=False, resume=False,
            save_deltas=save_deltas, lora=lora, push_to_hub=None, hub_private=None,
            callback="HFDeltaPruneCallback",
        )  # fmt: skip
        self.calibration_dataset = calibration_dataset
        if objective == "metric" and calibration_dataset is None and self.settings.fits:
            raise ValueError(
                "objective='metric' needs labelled data that was neither trained on nor is scored: pass "
                "calibration_dataset=, or take objective='output_change' (no labels)"
            )
        self.reporter: Reporter = LogReporter()
        self.results: list[Result] = []
        self._trainer: Trainer | None = None
        self._base: BaseWeights | None = None
        self._batch: Any = None
        self._source = ""

    def attach(self, trainer: Trainer) -> HFDeltaPruneCallback:
        """Tell this callback its trainer, and the trainer this callback if it does not have it.

        Args:
            trainer: not yet in training.

        Returns:
            This callback.
        """
        self._trainer = trainer
        if not any(callback is self for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the base and check all that can be checked before the first step."""
        if self._trainer is None:
            raise ValueError(f"HFDeltaPruneCallback does not know its trainer; write {_ATTACH}")
        trainer, settings = self._trainer, self.settings
        _check_trainer(trainer, settings, state)
        warn_of_direction(settings)
        self._check_folder()
        _go_last(trainer, self)
        model, optimizers = self._model, self._optimizers()
        find_adapter(model, settings.lora)
        self._base = BaseWeights.take(model, settings.pretrained, settings.revision, settings.scope)
        self._base.adopt_optimizer_copies(model, optimizers)
        with self._adapter_view() as base:
            base.check_complete(model, new_names(model, optimizers))
            self._check_scope(base)
        passes = self._passes()
        passes.check_monitor()
        self._take_calibration_data(passes)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, calibrate, score, save; then put the fine-tuned weights back."""
        assert self._base is not None
        settings = self.settings
        for optimizer in self._optimizers():
            if callable(getattr(optimizer, "eval", None)):  # a schedule-free one, whose weights for evaluation differ
                optimizer.eval()
        self._base.convert_like(self._model)
        with self._adapter_view(keep=settings.apply) as base:
            new = new_names(self._model, self._optimizers())
            scope = self._scope()
            if not can_be_pruned(base, self._model, scope, settings.callback):
                return
            labelled = self.calibration_dataset if settings.fits and settings.objective == "metric" else None
            run = HFPruneRun(
                settings, self._passes(), base, scope, new, self._batch, labelled, self._source, self._folder,
                self.reporter,
            )  # fmt: skip
            self.results = run.run()
        self._base = None

    @property
    def _model(self) -> nn.Module:
        assert self._trainer is not None
        model: Any = self._trainer.model
        return cast(nn.Module, model)

    @property
    def _folder(self) -> Path:
        assert self._trainer is not None
        return Path(self.settings.output_dir or Path(str(self._trainer.args.output_dir)) / "deltas")

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

    def _check_scope(self, base: BaseWeights) -> None:
        """Refuse a scope that leaves nothing to prune, and a method by blocks if none of what is trained is in one."""
        scope, tensors = self._scope(), canonical_tensors(self._model)
        pruned = {n: tensors[n] for n, fate in scope.fates(base.tensors, tensors).items() if fate == "prune"}
        for method in self.settings.methods:
            if METHODS[method].by_blocks:
                check_method(f"{method} goes", scope.placed(pruned))

    def _check_folder(self) -> None:
        check_writable(self._folder)
        tell_earlier_run(self._folder, RESULTS_FILE)

    def _take_calibration_data(self, passes: HFPasses) -> None:
        """Take and try the data that the methods need, so that what is wrong with it is known now."""
        settings = self.settings
        self._batch, self._source = None, ""
        if settings.fits and settings.objective == "metric":
            self._source = "calibration_dataset"
        by_change = settings.fits and settings.objective == "output_change"
        if not (by_change or settings.needs_inputs or settings.methods_with_gradients):
            return
        self._batch, source = calibration_batch(passes.trainer, self.calibration_dataset, settings.calibration_samples)
        self._source = self._source or source
        if passes.output_layer is not None:
            resolve_layer(passes.module, passes.output_layer)
        try:
            passes.outputs(self._batch, lambda _, output: output)
            if settings.methods_with_gradients:
                passes.output_gradients(self._batch)
        except Exception as error:  # of the user's model, in any way
            fault = " ".join(str(error).split())
            raise ValueError(
                f"the calibration batch ({source}) cannot be used: {type(error).__name__}: {fault}"
            ) from error


def _check_trainer(trainer: Trainer, settings: PruneSettings, state: TrainerState) -> None:
    """Refuse a trainer that cannot do what the settings ask for.

    Raises:
        ValueError: several processes, weights that are hidden or not the base's, or nothing to evaluate.
    """
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "HFDeltaPruneCallback runs in one process that holds whole weights, without DeepSpeed or FSDP: leave it "
            "out, save the model, and take `dpp prune BASE FINETUNED`"
        )
    if trainer.hp_search_backend is not None:
        raise ValueError("leave HFDeltaPruneCallback out of hyperparameter_search; attach it for the final training")
    if trainer.eval_dataset is None and type(trainer).get_eval_dataloader is Trainer.get_eval_dataloader:
        raise ValueError("HFDeltaPruneCallback scores by Trainer.evaluate: give the Trainer an eval_dataset")
    model: Any = trainer.model
    if not has_weights(model):
        raise ValueError(f"{type(model).__name__} holds no weights yet, so there is no base to take")
    if state.global_step > 0 and settings.pretrained is None:
        raise ValueError(
            f"training resumes at step {state.global_step}, so the model no longer holds the base: pass "
            "HFDeltaPruneCallback(pretrained=<folder or hub id of the base>)"
        )


def _go_last(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback behind those that may still change weights, and before those that close their logs at the end."""
    others = [c for c in trainer.callback_handler.callbacks if c is not callback]
    loggers = [c for c in others if type(c).__module__.startswith("transformers.integrations")]
    rest = [c for c in others if c not in loggers]
    trainer.callback_handler.callbacks = [*rest, callback, *loggers]  # a new list: the old one is being gone through
