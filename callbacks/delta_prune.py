"""DeltaPruneCallback: at the end of fit, prune the delta, find q, score every pruned model and save its folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from dpp_lightning.calibration.output_change import Measure, resolve_layer
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights, has_weights, new_names
from dpp_lightning.callbacks.prune_run.best_weights import best_weights
from dpp_lightning.callbacks.prune_run.evaluation import ForwardFn, check_logged, read_monitor
from dpp_lightning.callbacks.prune_run.lora_view import AdapterView, adapter_view, find_adapter
from dpp_lightning.callbacks.prune_run.progress import Log, Reporter
from dpp_lightning.callbacks.prune_run.run import PruneRun
from dpp_lightning.callbacks.prune_run.settings import check_settings, check_shared, check_trainer, listed, output_layer
from dpp_lightning.experiments.grid import Result
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.atomic_write import check_writable
from dpp_lightning.tensors.names import buffer_names, canonical_tensors
from dpp_lightning.tensors.shards import reshard


class DeltaPruneCallback(pl.Callback):
    """Prune the delta (fine-tuned minus base weights) at the end of fit and score every pruned model.

    For each method, rate and mask seed: prune, find q where the method searches it, run the validation loop, save a
    delta folder. Then the fine-tuned weights are put back bit for bit, unless ``apply=True``. ``Trainer.validate``
    and ``Trainer.test`` with a fine-tuned checkpoint give the same table without training.

    Args:
        method: a name of ``METHODS`` or several.
        pruning_rate: fraction of the delta dropped, in [0, 1), or several.
        seeds: mask seeds; q is found on the first one's mask.
        monitor: the logged validation metric that is the score.
        mode: whether the best score is the ``max`` or the ``min``.
        output_dir: where delta folders and ``results.jsonl`` go; default ``deltas`` in the trainer's log folder.
        pretrained: local folder, file or hub id of the base; default the weights at the start of training (AdamR's
            theta_0 where the optimizer holds it).
        revision: of a hub id.
        objective: how q is searched: ``output_change`` on one unlabelled batch, or ``metric`` on labelled data held out
            from training and from the scored split.
        calibration_samples: size of the batch for the output change.
        calibration_dataloader: data for q; default the DataModule's ``calibration_dataloader()``, else, without labels,
            fixed items of the training data.
        output_layer: submodule whose output is compared; default the last one with parameters, which gives the logits.
            ``last_hidden`` takes the layer that the module names in its attribute ``output_layer``, as the papers'
            code for encoders does; it suits large deltas and misleads on those that AdamR made small.
        output_measure: how outputs are compared: ``mean`` absolute difference, or ``top-logits``, the squared
            difference over the fine-tuned model's five largest logits (the papers' code for decoders).
        forward_fn: ``(module, batch) -> Tensor`` in place of a hooked evaluation step. A module may instead have
            ``calibration_steps(batch)``, a generator of a forward and of the places that are no padding.
        scope, include, exclude, outside, carry: which tensors are pruned, see
        :class:`dpp_lightning.pruning.scope.Scope`.
        dtype: how the kept values are held in the file (and so in the score); default the weights' dtype, at most 32
            bits.
        method_settings: a method's own settings under its name, such as ``{"magnitude": {"budget": "model"}}``.
        apply: leave the pruned weights in the model; needs a single method, rate and seed.
        ckpt: prune the weights at the end of training (``last``) or ModelCheckpoint's ``best``.
        plot: also plot score and output change over q for each rate, ``q_curve.png``: True for the first method, or a
            method's name.
        resume: go on where an earlier run of the same weights and settings stopped: the rows that ``results.jsonl`` in
            ``output_dir`` has are kept and not made again. A file of another run is refused.
        save_deltas: save a delta folder for each row; without it their bytes are counted all the same.
        lora: what is pruned of a module with a LoRA adapter (a ``PeftModel`` by peft): ``adapter`` (the default there)
            its own parameters A and B, whose base is zero, saved also as a PEFT folder ``adapter`` inside the delta's;
            ``merged`` the dense delta scaling B A of each adapted weight, which fits the plain base.

    Attributes:
        results: a row for the base, the fine-tuned and each pruned model. Where the trainer starts the ranks itself
            (``ddp_fork``, ``ddp_spawn``) they stay there: read ``results.jsonl``, or ``trainer.callback_metrics``.

    Raises:
        ValueError: at construction or before training starts: a rate outside [0, 1), an unknown method, settings that
            contradict each other, a monitor that is not logged, no validation data, an output folder that cannot be
            written, weights that cannot be pruned, a strategy that hides them (DeepSpeed, FSDP1) or lets ranks share
            their memory, a base that is not the one training started from.
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
        calibration_samples: int = 64,
        calibration_dataloader: Iterable[Any] | None = None,
        output_layer: str | None = None,
        output_measure: Measure = "mean",
        forward_fn: ForwardFn | None = None,
        scope: Literal["all", "linear"] = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Literal["carry", "revert"] = "carry",
        carry: Sequence[str] = (),
        dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None,
        method_settings: dict[str, dict[str, str | float]] | None = None,
        apply: bool = False,
        ckpt: Literal["last", "best"] = "last",
        plot: bool | str = False,
        resume: bool = False,
        save_deltas: bool = True,
        lora: AdapterView | None = None,
    ) -> None:
        self.methods = [method] if isinstance(method, str) else list(method)
        self.rates = [float(r) for r in listed(pruning_rate)]
        self.seeds = list(listed(seeds))
        self.monitor, self.mode = monitor, mode
        self.output_dir = output_dir
        self.pretrained, self.revision = pretrained, revision
        self.objective = objective
        self.calibration_samples = calibration_samples
        self.calibration_dataloader = calibration_dataloader
        self.output_layer, self.output_measure, self.forward_fn = output_layer, output_measure, forward_fn
        self.scope = Scope(scope, tuple(include), tuple(exclude), outside, tuple(carry))
        self.dtype, self.apply, self.ckpt, self.plot = dtype, apply, ckpt, plot
        self.method_settings = method_settings or {}
        self.resume, self.save_deltas, self.lora = resume, save_deltas, lora
        self.reporter: Reporter = Log()
        check_settings(self)
        self.results: list[Result] = []
        self._base: BaseWeights | None = None
        self._folder: Path | None = None
        self._fitted = self._monitor_seen = self._running = self._pruning = False
        self._restored: str | None = None
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check all that can be checked, and take the base's weights where they exist by now."""
        # of a fit in spawned processes the trainer's launcher alone knows afterwards
        spawned = getattr(getattr(trainer.strategy, "launcher", None), "_already_fit", False)
        if stage == "predict" or (stage != "fit" and (self._fitted or spawned)):
            self._fitted = self._fitted or spawned
            return
        check_trainer(self, trainer, pl_module, stage)
        self._fitted = self._fitted or stage == "fit"
        self._base, self._restored, self._monitor_seen, self._running, self._pruning = None, None, False, False, False
        # behind all others, so that ModelCheckpoint, WeightAveraging and SWA have done theirs at the end of fit
        trainer.callbacks = [*(c for c in trainer.callbacks if c is not self), self]  # type: ignore[attr-defined]
        if stage == "fit":
            self.results = []
        self._folder = Path(self.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "deltas")
        if trainer.is_global_zero:
            check_writable(self._folder)
        if has_weights(pl_module):
            find_adapter(pl_module, self.lora)
            self._base = BaseWeights.take(pl_module, self.pretrained, self.revision)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the base of a module that made its weights in ``configure_model``, and check the output layer."""
        if self._base is None:
            restored = trainer.ckpt_path is not None and not trainer.strategy.restore_checkpoint_after_setup
            if restored and self.pretrained is None:
                self._base = BaseWeights({}, explicit=False)  # only an optimizer can still know theta_0
            else:
                self._base = BaseWeights.take(pl_module, self.pretrained, self.revision)
        with self._seen(pl_module):
            if self.forward_fn is None:
                resolve_layer(pl_module, self.layer(pl_module))

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a monitor that is never logged now, not after hours."""
        if len(trainer.num_sanity_val_batches) > 1:
            return  # the trainer keeps no metrics of a sanity check of several loaders: on_train_start looks
        read_monitor(trainer.callback_metrics, self.monitor)
        self._monitor_seen = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle on the base, now that optimizers and checkpoint are restored; verify it against the checkpoint's."""
        assert self._base is not None
        reshard(pl_module)
        check_shared(self, pl_module)
        known = self._restored is not None
        self._base.adopt_optimizer_copies(pl_module, trainer.optimizers, verified=known)
        self._base.convert_like(pl_module)
        with self._seen(pl_module) as base:
            self._check_base(trainer, pl_module, base)
        if not self._monitor_seen:
            self._running = True
            try:
                check_logged(trainer, self.monitor)
            finally:
                self._running = False

    def state_dict(self) -> dict[str, Any]:
        """The base's fingerprint, so that a resumed fit can tell whether its base is still the original one."""
        return {"base_fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._restored = state_dict.get("base_fingerprint")

    # ------------------------------------------------------------------ the job

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune, calibrate, score, save; then put the fine-tuned weights back."""
        reshard(pl_module)
        best = self.ckpt == "best"
        with best_weights(trainer, pl_module, keep=self.apply) if best else nullcontext():
            self._run(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """``Trainer.validate`` on a fine-tuned checkpoint: the same table without training."""
        if trainer.state.fn == TrainerFn.VALIDATING and not self._running:
            self._evaluate(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """``Trainer.test`` on a fine-tuned checkpoint: the same table on the test split."""
        if trainer.state.fn == TrainerFn.TESTING and not self._running:
            self._evaluate(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what was not done when a fit is stopped."""
        if trainer.state.fn == TrainerFn.FITTING and isinstance(exception, KeyboardInterrupt):
            rank_zero_warn(
                f"pruning was stopped; the deltas finished so far are in {self._folder}, and the model holds the "
                "fine-tuned weights"
                if self._pruning
                else "fit was stopped before its end: no delta was pruned or saved. Resume from the last checkpoint "
                "with ckpt_path= (--ckpt_path on the command line); the base stays the original one"
            )

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run outside a fit, if it is known which weights are the base; after a fit the table is made already."""
        if self._fitted or self._base is None:
            return
        reshard(pl_module)
        check_shared(self, pl_module)
        self._base.convert_like(pl_module)
        declared = getattr(pl_module, "pretrained", None) is not None or self._restored is not None
        if not self._base.explicit and not (declared and trainer.ckpt_path is not None):
            rank_zero_warn(
                "DeltaPruneCallback did not prune: nothing tells which weights are the base. Pass "
                "DeltaPruneCallback(pretrained=<folder or hub id of the base>), or a checkpoint (ckpt_path) written in "
                "a fit with this callback"
            )
            return
        with self._seen(pl_module) as base:
            self._verify(base.fingerprint(pl_module, new_names(pl_module, ()), self.scope.carry))
        self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._folder is not None
        self._running = self._pruning = True
        try:
            with self._seen(pl_module, keep=self.apply) as base:
                run = PruneRun(self, trainer, pl_module, base, self._scope(pl_module, trainer), self._folder)
                self.results = run.run()
        finally:
            self._running = False

    # ------------------------------------------------------------------ pieces

    def _seen(self, module: pl.LightningModule, *, keep: bool = False) -> AbstractContextManager[BaseWeights]:
        """The module and its base as they are pruned, with an adapter's own or merged weights."""
        assert self._base is not None
        return adapter_view(module, self._base, self.lora, keep=keep)

    def _check_base(self, trainer: pl.Trainer, module: pl.LightningModule, base: BaseWeights) -> None:
        """Refuse a base that is not known whole, is another than the checkpoint's, or leaves nothing to prune."""
        own, new = canonical_tensors(module), new_names(module, trainer.optimizers)
        trainable = {name for name, tensor in own.items() if tensor.requires_grad}
        missing = sorted(trainable - new - set(base.tensors))
        if missing and not base.explicit:  # a checkpoint the user named lacks just what is new
            raise ValueError(
                f"the base's values of {len(missing)} tensors are unknown ({', '.join(missing[:3])}): the checkpoint's "
                "weights were restored before they could be seen. Pass "
                "DeltaPruneCallback(pretrained=<folder or hub id of the base>)"
            )
        self._fingerprint = base.fingerprint(module, new, self.scope.carry)
        self._verify(self._fingerprint)
        self._scope(module, trainer).fates(base.tensors, own)

    def _verify(self, fingerprint: str) -> None:
        if self._restored is not None and fingerprint != self._restored:
            raise ValueError(
                f"the base now seen (fingerprint {fingerprint}) is not the one the checkpoint's training started from "
                f"({self._restored}); build the module from the original base, or pass "
                "DeltaPruneCallback(pretrained=<folder or hub id of the base>)"
            )

    def layer(self, module: pl.LightningModule) -> str | None:
        """Name of the submodule whose output is compared; None for the last with parameters."""
        return output_layer(self.output_layer, module)

    def _scope(self, module: pl.LightningModule, trainer: pl.Trainer) -> Scope:
        """The scope with buffers and the heads that were new in this training carried."""
        return self.scope.carrying(new_names(module, trainer.optimizers) | buffer_names(module))
