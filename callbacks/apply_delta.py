"""ApplyDelta: score or predict with base plus delta, without fine-tuned weights on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from dpp_lightning.callbacks.prune_run.lora_view import is_lora_parameter
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.storage.file_content import read_json_object
from dpp_lightning.storage.locate import few_names
from dpp_lightning.storage.model_configuration import CONFIG, other_settings
from dpp_lightning.storage.model_folder import delta_side_files, is_tokenizer_file


class ApplyDelta(pl.Callback):
    """Apply a delta to the base weights that the module holds, for the time of a validate, test or predict run.

    Afterwards the module holds the base weights again, bit for bit. ``dpp test --delta DIR`` uses this callback.

    Args:
        delta: delta folder or hub id.
        task: for a delta merged from several tasks, the task whose head is used; default the module's attribute
            ``task``, if the delta has a task of that name.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: in ``setup``, if the callback is used in a fit or beside another one, the delta is damaged, or the
            delta has no such task or the module has another one; at the start of the run, if the module does not hold
            the delta's base.
        FileNotFoundError: in ``setup``, if there is no such delta.
    """

    def __init__(self, delta: str, task: str | None = None, revision: str | None = None) -> None:
        self.folder, self.task, self.revision = delta, task, revision
        self._delta: SparseDelta | None = None  # read in setup
        self._config: Path | None = None

    @property
    def state_key(self) -> str:
        """Of this delta alone, so that Lightning tells several from one another."""
        return f"{type(self).__qualname__}({self.folder!r}, {self.task!r}, {self.revision!r})"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read and check the delta."""
        others = [c.folder for c in getattr(trainer, "callbacks", ()) if isinstance(c, ApplyDelta) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise ValueError(
                f"the deltas {self.folder} and {', '.join(others)} would both go onto one base: apply one in each run, "
                "or merge them first (dpp merge)"
            )
        if stage == "fit":
            raise ValueError("a delta is applied to a base that is scored, not trained: use validate, test or predict")
        delta = SparseDelta.from_pretrained(self.folder, revision=self.revision)
        delta_tasks, module_task = delta.info.tasks, getattr(pl_module, "task", None)
        task = self.task or (module_task if module_task in delta_tasks else None)
        if task is not None and module_task is not None and task != module_task:
            raise ValueError(f"task {task!r} of the delta was asked for, but the model's task is {module_task!r}")
        if any(map(is_lora_parameter, delta.tensors)):
            raise ValueError(
                f"{self.folder} is the delta of a LoRA adapter, which begins elsewhere in every model: load its folder "
                "adapter by peft, or prune with lora=merged (--trainer.callbacks.lora merged)"
            )
        self._delta = delta if task is None else delta.for_task(task)
        beside = delta_side_files(
            self.folder, self.revision, tasks=delta_tasks, task=task, absent=delta.info.absent_files
        )
        self._config = beside.get(CONFIG)
        if own := sorted(name for name in beside if is_tokenizer_file(name)):
            rank_zero_warn(
                f"{self.folder} has a tokenizer of its own ({few_names(own)}), and the data of this run is made with "
                "another unless you gave it: dpp apply writes a folder for --model.pretrained that has both"
            )

    def _apply(self, pl_module: pl.LightningModule) -> None:
        assert self._delta is not None
        if self._delta.is_applied:
            return
        if self._config and (others := _other_settings(pl_module, self._config)):
            rank_zero_warn(
                f"{self.folder} has a {CONFIG} with another {few_names(others)} than the model of this run, which "
                "keeps its own: give --model.pretrained the folder that dpp apply writes"
            )
        self._delta.apply_(pl_module)

    def _revert(self, pl_module: pl.LightningModule) -> None:
        if self._delta is not None and self._delta.is_applied:
            self._delta.revert_(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the delta."""
        self._apply(pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the base weights back."""
        self._revert(pl_module)

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the base weights back."""
        self._revert(pl_module)


def _other_settings(module: pl.LightningModule, path: Path) -> list[str]:
    """Settings in a delta's configuration that the module's transformers model of that kind has otherwise."""
    saved = read_json_object(path)
    configs: list[Any] = [getattr(child, "config", None) for child in module.modules()]
    held = [config for config in configs if hasattr(config, "to_dict")]
    ours = [config for config in held if getattr(config, "model_type", None) == saved.get("model_type")]
    return other_settings(type(ours[0]).from_dict(saved).to_dict(), ours[0].to_dict()) if ours else []
