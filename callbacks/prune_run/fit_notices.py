"""What several callbacks in one trainer, several fits of one callback and trial runs need to be told or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.experiments.earlier_run import entries_of_run, next_name
from dpp_lightning.experiments.results import PLOT_FILE
from dpp_lightning.storage.locate import local_path

NOTHING_TRAINED = (
    "DeltaPruneCallback did not prune: this fit had no step to take (the checkpoint is of the end of training, or "
    "max_epochs, max_steps or limit_train_batches leaves none). The table: Trainer.validate(..., ckpt_path=...) "
    "with DeltaPruneCallback(pretrained=<base>), or dpp validate --ckpt_path FILE"
)


def trial_settings(settings: PruneSettings) -> PruneSettings:
    """Settings of ``fast_dev_run``: each method at the first rate and seed, nothing is kept, continued or uploaded."""
    return replace(
        settings, rates=settings.rates[:1], seeds=settings.seeds[:1], ckpt="last", plot=False, resume=False,
        save_deltas=False, push_to_hub=None, hub_private=None,
    )  # fmt: skip


def folder_of(settings: PruneSettings, trainer: pl.Trainer) -> Path:
    """The output folder of a callback in a trainer. All ranks must call: the log folder is broadcast."""
    return local_path(settings.output_dir or Path(trainer.log_dir or trainer.default_root_dir) / "deltas")


def settings_of_all(trainer: pl.Trainer) -> list[PruneSettings]:
    """The settings of every callback of a trainer that prunes."""
    found = [getattr(callback, "settings", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [settings for settings in found if isinstance(settings, PruneSettings)]


def check_several(settings: Sequence[PruneSettings], folders: Sequence[Path]) -> None:
    """Refuse callbacks of one trainer that would spoil each other's results.

    Raises:
        ValueError: two have one output folder, or one leaves pruned weights in the model that another would prune.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := next((folder for folder in folders if resolved.count(folder.resolve()) > 1), None):
        raise ValueError(
            f"{len(settings)} {settings[0].callback}s of this trainer would write into {twice}: give each an "
            "output_dir of its own"
        )
    if len(settings) > 1 and any(s.apply for s in settings):
        raise ValueError(
            f"apply=True leaves pruned weights in the model, which another {settings[0].callback} of the trainer would "
            "take for the fine-tuned ones: prune with one callback, or leave apply out"
        )


def metric_prefix(settings: PruneSettings, trainer: pl.Trainer) -> str:
    """See :func:`prefix_of`. All ranks must call."""
    return prefix_of(folder_of(settings, trainer), [folder_of(other, trainer) for other in settings_of_all(trainer)])


def prefix_of(folder: Path, folders: Sequence[Path]) -> str:
    """What the names of a callback's metrics start with: ``dpp``, and with several callbacks its folder as well.

    Args:
        folder: the callback's.
        folders: those of all callbacks of the trainer.
    """
    if len(folders) < 2:
        return "dpp"
    unique = [other.name for other in folders].count(folder.name) == 1
    parts = [part for part in folder.parts if part.strip("/.")]  # loggers take no '..' in a name
    return f"dpp/{folder.name if unique else '/'.join(parts)}"


def tell_earlier_run(folder: Path, results_file: str) -> None:
    """Say before training that the folder holds an earlier run, and where that will go."""
    if entries_of_run(folder, (results_file, PLOT_FILE)):
        rank_zero_info(
            f"{folder} holds the deltas of an earlier run: they are moved to {next_name(folder)} when the first row of "
            "this run is made"
        )
