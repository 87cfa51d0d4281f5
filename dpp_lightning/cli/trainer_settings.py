"""Settings of the trainer that cannot work, alone or together, found before a model is built."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli.config_checks import is_callback, listed, settings_of
from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.storage.atomic_write import check_writable
from dpp_lightning.storage.locate import few_names, local_path

_LARGEST_SEED = 2**32 - 1
_AT_LEAST_1 = ("accumulate_grad_batches", "check_val_every_n_epoch")
_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}
# what barebones leaves out: settings that ask for it, and callbacks that cannot do without
_NOT_BAREBONES = (
    "logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps",
    "num_sanity_val_steps", "fast_dev_run", "detect_anomaly", "profiler",
)  # fmt: skip
_NEED_MORE = (
    Checkpoint, DeltaPruneCallback, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary, ProgressBar,
)  # fmt: skip


def check_trainer_settings(command: str, config: Namespace) -> None:
    """Refuse settings that Lightning refuses late, by a traceback or not at all.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: as parsed, nothing instantiated.

    Raises:
        UsageError: a seed or number out of its range, no batch to work on, ``barebones`` beside what it leaves out.
        ValueError: a folder for checkpoints that cannot be written.
    """
    trainer, seed = config.trainer, config.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"--seed_everything is {seed}, expected a whole number from 0 to {_LARGEST_SEED}")
    for name in _AT_LEAST_1:
        if trainer.get(name) is not None and trainer.get(name) < 1:
            raise UsageError(f"--trainer.{name} is {trainer.get(name)}, expected a whole number of at least 1")
    limit = _LIMITS.get(command)
    if limit is not None and trainer.get(limit) == 0:
        raise UsageError(f"--trainer.{limit} is 0, so no batch would be read: give 1 or more, or leave it out")
    if trainer.get("barebones"):
        _check_barebones(command, trainer)
    _check_checkpoint_folders(listed(trainer.get("callbacks")))


def _check_barebones(command: str, trainer: Namespace) -> None:
    """Refuse ``barebones`` beside what it leaves out, all of it at once, where Lightning names the first."""
    asked = [f"trainer.{name}" for name in _NOT_BAREBONES if trainer.get(name)]
    callbacks = [c for c in listed(trainer.get("callbacks")) if any(is_callback(c, cls) for cls in _NEED_MORE)]
    asked += [c.class_path.rpartition(".")[2] if isinstance(c, Namespace) else type(c).__name__ for c in callbacks]
    if command in ("validate", "test"):
        asked.append(f"{command} (which shows scores)")
    if asked:
        raise UsageError(
            "trainer.barebones leaves out logging, scores, checkpoints and bars, so it cannot be used with "
            f"{few_names(asked)}: leave barebones out (--trainer.barebones false), or these"
        )


def _check_checkpoint_folders(callbacks: list[Any]) -> None:
    """Refuse a folder that no checkpoint can be written into, which Lightning would find after an epoch."""
    for callback in callbacks:
        if isinstance(callback, Namespace) and is_callback(callback, ModelCheckpoint):
            folder = settings_of(callback).get("dirpath")
            if isinstance(folder, str) and "://" not in folder:
                check_writable(local_path(folder))
