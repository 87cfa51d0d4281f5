"""ApplyDelta: score or predict with base plus delta, without fine-tuned weights on disk."""

from __future__ import annotations

import lightning.pytorch as pl

from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.delta.task_heads import task_names


class ApplyDelta(pl.Callback):
    """Put a delta onto the base that the module holds while it is validated, tested or predicted with.

    The base's weights are back afterwards, bit for bit. ``dpp test --delta DIR`` is this callback.

    Args:
        delta: delta folder or hub id.
        task: of a merged delta, the one whose head is taken; default the module's attribute ``task``, where the delta
            merges one of that name.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: in ``setup``: used in a fit, a damaged delta, a task it has not or that is not the module's; at the
            start of the pass: the module does not hold the delta's base.
        FileNotFoundError: in ``setup``: no such delta.
    """

    def __init__(self, delta: str, task: str | None = None, revision: str | None = None) -> None:
        self.folder, self.task, self.revision = delta, task, revision
        self._delta: SparseDelta | None = None
        self._applied = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read and check the delta."""
        if stage == "fit":
            raise ValueError("a delta is applied to a base that is scored, not trained: use validate, test or predict")
        delta = SparseDelta.from_pretrained(self.folder, revision=self.revision)
        tasks, own = task_names(delta.info), getattr(pl_module, "task", None)
        task = self.task or (own if own in tasks else None)
        if task is not None and own is not None and task != own:
            raise ValueError(f"task {task!r} of the delta was asked for, but the model's task is {own!r}")
        self._delta = delta if task is None else delta.for_task(task)

    def _apply(self, pl_module: pl.LightningModule) -> None:
        assert self._delta is not None
        if not self._applied:
            self._delta.apply_(pl_module)
            self._applied = True

    def _revert(self, pl_module: pl.LightningModule) -> None:
        if self._delta is not None and self._applied:
            self._delta.revert_(pl_module)
            self._applied = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the delta."""
        self._apply(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the delta off."""
        self._revert(pl_module)

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the delta off."""
        self._revert(pl_module)
