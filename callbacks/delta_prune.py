"""DeltaPruneCallback: at the end of fit, prune the delta, find q, score every pruned model and save its folder."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dpp_lightning.calibration.output_change import Measure, resolve_layer
from dpp_lightning.callbacks.prune_run.base_weights import (
    ASK_FOR_PRETRAINED,
    BaseWeights,
    declared,
    has_weights,
    new_names,
)
from dpp_lightning.callbacks.prune_run.best_weights import best_weights, check_loads, kept_none
from dpp_lightning.callbacks.prune_run.calibration_data import CalibrationData
from dpp_lightning.callbacks.prune_run.evaluation import (
    ForwardFn,
    callbacks_act_in_validation,
    check_evaluation,
    check_logged,
    read_monitor,
)
from dpp_lightning.callbacks.prune_run.evaluation_trial import check_optimizers
from dpp_lightning.callbacks.prune_run.exchanged_models import can_be_pruned
from dpp_lightning.callbacks.prune_run.fit_notices import (
    NOTHING_TRAINED,
    check_several,
    folder_of,
    settings_of_all,
    tell_earlier_run,
    trial_settings,
)
from dpp_lightning.callbacks.prune_run.hub_upload import push_deltas
from dpp_lightning.callbacks.prune_run.lora_view import AdapterView, adapter_view, find_adapter
from dpp_lightning.callbacks.prune_run.progress import RESULTS_FILE, Reporter
from dpp_lightning.callbacks.prune_run.rows_bar import rows_reporter
from dpp_lightning.callbacks.prune_run.run import PruneRun
from dpp_lightning.callbacks.prune_run.scope_checks import (
    check_inputs,
    check_methods,
    tensors_to_prune,
    warn_of_own_base,
)
from dpp_lightning.callbacks.prune_run.settings import PruneSettings, as_tuple
from dpp_lightning.callbacks.prune_run.trainer_bar import finish_bar, shows_bars
from dpp_lightning.callbacks.prune_run.trainer_checks import check_shards, check_trainer
from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.run_lock import alone_in
from dpp_lightning.experiments.sweep_worker import Worker
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.atomic_write import check_writable
from dpp_lightning.tensors.names import buffer_names
from dpp_lightning.tensors.shards import reshard

_CHECKPOINT_KEY = "dpp_base_fingerprints"  # in a checkpoint: the carried names to the fingerprint of the base


class DeltaPruneCallback(pl.Callback):
    """Prune the delta (fine-tuned minus base weights) at the end of fit and score every pruned model.

    For each method, rate and mask seed: prune, find q where the method searches it, run the validation loop, save a
    delta folder. Then the fine-tuned weights are put back bit for bit, unless ``apply=True``. ``Trainer.validate``
    and ``Trainer.test`` with a fine-tuned checkpoint give the same table without training.

    ``output_dir`` then holds

    - ``results.jsonl``: one JSON object per line and scored model, first the base, then the fine-tuned model, then the
      pruned ones, each written as soon as it is scored. It has the ``method``, ``pruning_rate`` and ``seed``, the
      ``score`` (the metric ``monitor`` on ``split``), ``q`` and the data it was found on (``q_split``), the bytes of
      the saved delta (``num_bytes``) and how many times smaller that is than the dense weights (``ratio``), the
      seconds, and the name of its ``folder``. The first line also has ``run``, what all rows have in common.
    - a folder ``{method}-p{pruning_rate}-seed{seed}`` per pruned model, which ``SparseDelta.from_pretrained``,
      ``dpp apply`` and ``dpp inspect`` read: the delta in ``delta_model.safetensors`` and ``delta_config.json``, a
      model card, ``config.json`` of a model of transformers or timm, and a pruned LoRA adapter in ``adapter``.
    - ``q_curve.png``, with ``plot``.
    - folders ``earlier-1``, ``earlier-2``, …, each with all that one earlier run left in ``output_dir``; it is moved
      there when the first row of the next run is made.

    With ``fast_dev_run`` every method is tried at the first rate and seed and nothing is written. Several callbacks in
    one trainer need an ``output_dir`` each; their metrics are ``dpp/{folder}/{method}/…``.

    The mean score over the seeds is logged as ``dpp/{method}/{pruning_rate}/{monitor}``, its standard deviation as the
    same with ``_std``; ``trainer.callback_metrics`` has both.

    Args:
        method: a name of ``METHODS`` or several.
        pruning_rate: fraction of the delta that is dropped, in [0, 1), or several.
        seeds: mask seeds, integers from 0; q is found on the mask of the first one.
        monitor: the logged validation metric that is the score.
        mode: whether the best score is the ``max`` or the ``min``.
        output_dir: folder for all that is written; default ``deltas`` in the trainer's log folder.
        pretrained: local folder, file or hub id of the base; default the weights at the start of training (AdamR's
            theta_0 where the optimizer holds it).
        revision: branch, tag or commit of a base that is a hub id.
        objective: how q is searched: ``output_change`` on one unlabelled batch, or ``metric`` on labelled data held out
            from training and from the scored split.
        calibration_samples: how many items are taken for calibration; default 64, 512 for methods that train
            (``refit``, ``lowrank``), 1024 for ``auto``.
        calibration_dataloader: data for q; default the DataModule's ``calibration_dataloader()``, else, without labels,
            fixed samples of the training data.
        output_layer: submodule whose output is compared; default the last one with parameters, which gives the logits.
            ``last_hidden`` takes the layer that the module names in its attribute ``output_layer``, as the papers'
            code for encoders does; it suits large deltas and misleads on those that AdamR made small.
        output_measure: how outputs are compared: ``mean`` absolute difference, or ``top-logits``, the squared
            difference over the fine-tuned model's five largest logits (the papers' code for decoders).
        forward_fn: ``(module, batch) -> Tensor``, called in place of the evaluation step where outputs are compared. A
            module may instead have ``calibration_steps(batch)``, a generator that runs a forward and yields a mask of
            the tokens that are no padding.
        scope: prune ``all`` floating-point tensors, or only the ``linear`` maps inside the model's blocks.
        include: glob patterns on canonical names; if given, only matching tensors are pruned.
        exclude: glob patterns on canonical names of tensors that are never pruned.
        outside: a tensor outside the scope is stored dense (``carry``) or gets its base value back (``revert``).
        carry: glob patterns on canonical names of tensors that are always stored dense. New heads and buffers are.
        blocks: where the model's blocks are, for ``linear`` and the methods that go by blocks, if names do not tell:
            globs of the leading parts of canonical names, one part for one, such as ``tower.cells.*``.
        dtype: how the kept values are held in the file (and so in the score); default the weights' dtype, at most 32
            bits.
        method_settings: settings of single methods by name, such as ``{"magnitude": {"budget": "model"}}``.
        apply: leave the pruned weights in the model; needs a single method, rate and seed.
        ckpt: prune the weights at the end of training (``last``) or ModelCheckpoint's ``best``.
        plot: also plot score and output change over q for each rate, ``q_curve.png``: True for the first method, or a
            method's name.
        resume: continue an earlier run of the same weights and settings: the rows in ``results.jsonl`` are kept and not
            made again. The file of another run is refused.
        save_deltas: save a delta folder for each row; without it their bytes are counted all the same.
        lora: what is pruned of a module with a LoRA adapter (a ``PeftModel`` by peft): ``adapter`` (the default there)
            its parameters A and B, whose base is zero, saved also as a PEFT folder ``adapter`` inside the delta's;
            ``merged`` the dense delta scaling B A of each adapted weight, which fits the plain base.
        push_to_hub: ``user/name``: upload the delta folders to the hub at the end. A single delta goes to that
            repository, each of several to ``user/name-{method}-p{pruning_rate}-seed{seed}``. A failed upload is a
            warning with the command to repeat it. The token is that of ``hf auth login`` or ``HF_TOKEN``.
        hub_private: whether repositories made for ``push_to_hub`` are private; default as the account has it.

    Attributes:
        settings: the arguments, checked.
        results: a row for the base, the fine-tuned and each pruned model. Where the trainer starts the ranks itself
            (``ddp_fork``, ``ddp_spawn``) they stay there: read ``results.jsonl``, or ``trainer.callback_metrics``.
        reporter: is called with every row as it is made; may be set before a run. Default: a bar over the rows on a
            terminal where the trainer shows bars, else a line for each.
        worker: of this process, if the runs of several processes into the folder are to share the rows, as those of
            ``dpp sweep`` do; may be set before a run. ``results`` are those of all then.

    Raises:
        ValueError: at construction or before training starts, if a rate is outside [0, 1), a method unknown, settings
            contradict each other, the monitor is not logged, there is no validation data, the output folder cannot be
            written, the weights cannot be pruned, the strategy hides them (DeepSpeed, FSDP1) or lets ranks share their
            memory, the base is not the one that training started from, or an upload is bound to fail.
    """

    def __init__(
        self,
        method: str | Sequence[str] = "darex-q",
        pruning_rate: float | Sequence[float] = 0.9,
        seeds: int | Sequence[int] = 0,
        monitor: str = "val_score",
        mode: Literal["max", "min"] = "max",
        output_dir: str | None = None,
        pretrained: str | None = None,
        revision: str | None = None,
        objective: Literal["output_change", "metric"] = "output_change",
        calibration_samples: int | None = None,
        calibration_dataloader: Iterable[Any] | None = None,
        output_layer: str | None = None,
        output_measure: Measure = "mean",
        forward_fn: ForwardFn | None = None,
        scope: Literal["all", "linear"] = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Literal["carry", "revert"] = "carry",
        carry: Sequence[str] = (),
        blocks: Sequence[str] = (),
        dtype: Literal["float32", "bfloat16", "float16", "int8", "int4", "int3", "int2"] | None = None,
        method_settings: dict[str, dict[str, str | float]] | None = None,
        apply: bool = False,
        ckpt: Literal["last", "best"] = "last",
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
            objective=objective, calibration_samples=calibration_samples, calibration_dataloader=calibration_dataloader,
            output_layer=output_layer, output_measure=output_measure, forward_fn=forward_fn,
            scope=Scope.of(scope, include, exclude, outside, carry, blocks), dtype=dtype,
            method_settings=method_settings or {}, apply=apply, ckpt=ckpt, plot=plot, resume=resume,
            save_deltas=save_deltas, lora=lora, push_to_hub=push_to_hub, hub_private=hub_private,
        )  # fmt: skip
        self.reporter: Reporter | None = None
        self.worker: Worker | None = None
        self.results: list[Result] = []
        self._asked = self.settings
        self._fitted: weakref.ref[pl.LightningModule] | None = None  # the module of the last fit
        self._fit_done = False  # later calls of validate and test have nothing to prune
        self._forget_run()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fitted": None}  # a weak reference cannot be sent to ranks

    def _forget_run(self) -> None:
        self._base: BaseWeights | None = None
        self._folder: Path | None = None
        self._base_fingerprint: str | None = None
        self._checkpoint_fingerprint: str | None = None  # of the base that a restored checkpoint's training began from
        self._monitor_checked = False
        self._calibration: CalibrationData | None = None
        self._pruning_began = self._training_ended = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check all that can be checked, and take the base's weights if they exist by now."""
        # the ranks of ddp_fork and ddp_spawn had their copy of this callback; only the launcher knows of their fit
        fit_in_ranks = getattr(getattr(trainer.strategy, "launcher", None), "_already_fit", False)
        self._fit_done = self._fit_done or fit_in_ranks
        if stage == "predict" or (stage != "fit" and self._fit_done):
            return
        self.settings = trial_settings(self._asked) if trainer.fast_dev_run else self._asked  # type: ignore[attr-defined]
        several = settings_of_all(trainer)
        check_several(several, [folder_of(settings, trainer) for settings in several])
        check_trainer(self.settings, trainer, pl_module, stage)
        self._forget_run()
        # behind all others, so that ModelCheckpoint, WeightAveraging and SWA have done theirs at the end of fit
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]
        if stage == "fit":
            self.results, self._fit_done = [], True
            self._tell_base(trainer, pl_module)
        self._folder = folder_of(self.settings, trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(self._folder)
            if not self.settings.resume:
                tell_earlier_run(self._folder, RESULTS_FILE)
        if has_weights(pl_module):
            find_adapter(pl_module, self.settings.lora)
            self._base = self._take_base(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the base of a module that made its weights in ``configure_model``, and check the output layer."""
        if self._base is None:
            restored = trainer.ckpt_path is not None and not trainer.strategy.restore_checkpoint_after_setup
            if restored and self.settings.pretrained is None:
                self._base = BaseWeights({}, explicit=False)  # only an optimizer can still hold theta_0
            else:
                self._base = self._take_base(pl_module)
        with self._adapter_view(pl_module):
            if self.settings.forward_fn is None:
                resolve_layer(pl_module, self.settings.output_layer_of(pl_module))

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a monitor that is never logged now, not after hours."""
        if len(trainer.num_sanity_val_batches) > 1 or callbacks_act_in_validation(trainer):
            return  # it keeps no metrics of several loaders, and those of callbacks are no score: on_train_start looks
        try:
            read_monitor(trainer.callback_metrics, self.settings.monitor)
        except ValueError:
            return  # some modules log nothing in this check: on_train_start looks
        self._monitor_checked = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the base, now that optimizers and checkpoint are restored, and check it and the monitor."""
        assert self._base is not None
        reshard(pl_module)
        check_shards(self.settings, pl_module)
        check_optimizers(trainer)
        # a base that the checkpoint's fingerprint is compared with may rest on an optimizer's rounded copy
        resumed = self._checkpoint_fingerprint is not None
        self._base.adopt_optimizer_copies(pl_module, trainer.optimizers, verified=resumed)
        self._base.convert_like(pl_module)
        with self._adapter_view(pl_module) as base:
            new, carry = new_names(pl_module, trainer.optimizers), self.settings.scope.carry
            base.check_complete(pl_module, new)
            self._base_fingerprint = base.verified_fingerprint(pl_module, new, carry, self._checkpoint_fingerprint)
            self._check_scope(trainer, pl_module, base)
            if not base.explicit and find_adapter(pl_module) is None:
                warn_of_own_base(self._to_prune(trainer, pl_module, base), pl_module)
        if self.settings.ckpt == "best":
            check_loads(pl_module)
        if not self._monitor_checked:
            check_logged(trainer, self.settings.monitor)
        check_evaluation(trainer, trying=True)
        self._take_calibration_data(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Calibrate on the first training batch, where the loaders give nothing else."""
        if self._calibration is not None and self._calibration.waiting:
            with self._adapter_view(pl_module):
                self._calibration.take_first()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The base's fingerprint, so that a resumed fit can tell whether its base is still the original one.

        It goes by the tensors it is over and not by a key of this callback, so that another order of several callbacks,
        or other settings, find it.
        """
        checkpoint.setdefault(_CHECKPOINT_KEY, {})[repr(self.settings.scope.carry)] = self._base_fingerprint

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See :meth:`on_save_checkpoint`."""
        saved = checkpoint.get(_CHECKPOINT_KEY, {})
        self._checkpoint_fingerprint = saved.get(repr(self.settings.scope.carry), next(iter(saved.values()), None))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, calibrate, score, save; then put the fine-tuned weights back."""
        self._training_ended = True
        reshard(pl_module)
        check_evaluation(trainer, trying=False)
        self._run(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where there was no training, and with it no end of it."""
        if not self._training_ended:
            rank_zero_warn(NOTHING_TRAINED)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """``Trainer.validate`` or ``Trainer.test`` on a fine-tuned checkpoint: the same table without training."""
        if trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            self._run_without_fit(trainer, pl_module)

    on_test_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what was not done when a fit is stopped."""
        if trainer.state.fn == TrainerFn.FITTING and isinstance(exception, KeyboardInterrupt):
            rank_zero_warn(
                f"pruning was stopped; the deltas finished so far are in {self._folder}, and the model holds the "
                "fine-tuned weights"
                if self._pruning_began
                else "fit was stopped before its end: no delta was pruned or saved. Resume from the last checkpoint "
                "with ckpt_path= (--ckpt_path on the command line); the base stays the original one"
            )

    def _run_without_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run in validate or test, if it is known which weights are the base; after a fit it was made already."""
        if self._fit_done or self._base is None:
            return
        reshard(pl_module)
        check_shards(self.settings, pl_module)
        self._base.convert_like(pl_module)
        told = declared(pl_module, "pretrained") is not None or self._checkpoint_fingerprint is not None
        if not self._base.explicit and not (told and trainer.ckpt_path is not None):
            rank_zero_warn(
                "DeltaPruneCallback did not prune: nothing tells which weights are the base. Pass "
                f"{ASK_FOR_PRETRAINED}, or a checkpoint (ckpt_path) written in a fit with this callback"
            )
            return
        with self._adapter_view(pl_module) as base:
            new, carry = new_names(pl_module, ()), self.settings.scope.carry
            base.verified_fingerprint(pl_module, new, carry, self._checkpoint_fingerprint)
            self._check_scope(trainer, pl_module, base)
        self._take_calibration_data(trainer, pl_module)
        self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._folder is not None
        assert self._calibration is not None
        settings, keep = self.settings, self.settings.apply
        best = settings.ckpt == "best" and trainer.state.fn == TrainerFn.FITTING
        if best and (reason := kept_none(trainer)):
            rank_zero_warn(f"DeltaPruneCallback did not prune: {reason}")
            return
        self._pruning_began = True
        weights = best_weights(trainer, pl_module, keep=keep) if best else nullcontext()
        worker = None if trainer.fast_dev_run else self.worker  # type: ignore[attr-defined]
        with self._own_folder(trainer, worker):
            trainer.strategy.barrier("dpp: the output folder is this run's")
            with weights, self._adapter_view(pl_module, keep=keep) as base:
                scope = self._scope(trainer, pl_module)
                if not can_be_pruned(base, pl_module, scope, settings.callback):
                    return
                finish_bar(trainer)
                with rows_reporter(self.reporter, shown=shows_bars(trainer)) as reporter:
                    run = PruneRun(settings, trainer, base, scope, self._calibration, self._folder, reporter, worker)
                    self.results = run.run()
            if trainer.is_global_zero and settings.push_to_hub is not None:
                push_deltas(self._folder, settings.repositories, private=settings.hub_private)

    def _own_folder(self, trainer: pl.Trainer, worker: Worker | None) -> AbstractContextManager[None]:
        """The output folder is this run's in the block, or that of the workers that share one, from here on."""
        assert self._folder is not None
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return nullcontext()
        if worker is None:
            return alone_in(self._folder, rank_zero_warn)
        worker.enter(rank_zero_warn)
        return nullcontext()

    def _tell_base(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Say which base a second fit of the same module has."""
        again = self._fitted is not None and self._fitted() is module
        if again and self.settings.pretrained is None and trainer.ckpt_path is None:
            rank_zero_info(
                "the base of this fit is what the earlier fit left in the module, not the base of that one; "
                f"{ASK_FOR_PRETRAINED} keeps one base for both"
            )
        self._fitted = weakref.ref(module)

    def _take_base(self, module: pl.LightningModule) -> BaseWeights:
        settings = self.settings
        return BaseWeights.take(module, settings.pretrained, settings.revision, settings.scope)

    def _take_calibration_data(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take and try the data that the methods need, so that what is wrong with it is known now."""
        with self._adapter_view(module) as base:
            data = self._calibration = CalibrationData(self.settings, trainer)
            if data.batch is not None:
                scope, pruned = self._scope(trainer, module), self._to_prune(trainer, module, base)
                check_inputs(self.settings, scope, pruned, data.inputs, data.all_inputs)

    def _adapter_view(self, module: pl.LightningModule, *, keep: bool = False) -> AbstractContextManager[BaseWeights]:
        """Module and base as they are pruned: a LoRA adapter's parameters against zero, or its merged weights."""
        assert self._base is not None
        return adapter_view(module, self._base, self.settings.lora, keep=keep)

    def _check_scope(self, trainer: pl.Trainer, module: pl.LightningModule, base: BaseWeights) -> None:
        """Refuse what cannot be pruned; see :mod:`dpp_lightning.callbacks.prune_run.scope_checks`."""
        check_methods(self.settings, self._scope(trainer, module), self._to_prune(trainer, module, base))

    def _to_prune(self, trainer: pl.Trainer, module: pl.LightningModule, base: BaseWeights) -> dict[str, Tensor]:
        later = any(isinstance(c, BaseFinetuning) for c in trainer.callbacks)  # type: ignore[attr-defined]
        scope, frozen = self._scope(trainer, module), later or self.settings.lora == "merged"
        return tensors_to_prune(scope, base.tensors, module, frozen=frozen)

    def _scope(self, trainer: pl.Trainer, module: pl.LightningModule) -> Scope:
        """The scope with buffers, and heads that were new in this training, carried."""
        return self.settings.scope.carrying(new_names(module, trainer.optimizers) | buffer_names(module))
