"""What ``dpp fit`` says of checkpoints: of an earlier fit's before it starts, and at its end where its own is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dpp_lightning.callbacks.prune_run.base_weights import declared
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.shards import is_dtensor


def earlier_checkpoint(trainer: Trainer) -> str | None:
    """A warning where a folder holds the ``last.ckpt`` of an earlier fit that this one does not go on from.

    Lightning keeps that file and gives the new one another name, ``last-v1.ckpt``.

    Args:
        trainer: before its fit.
    """
    for callback in _model_checkpoints(trainer):
        named_last = callback.save_last or callback.filename == callback.CHECKPOINT_NAME_LAST
        if not named_last or callback.dirpath is None:
            continue
        file = Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
        if file.exists() and callback._enable_version_counter:
            shown = shlex.quote(_short(file))
            return (
                f"{shown} is of an earlier fit and is kept; this fit starts anew and writes under another name. "
                f"To go on from the earlier one: --ckpt_path {shown}"
            )
    return None


def next_commands(trainer: Trainer, module: LightningModule) -> str | None:
    """Where the checkpoint of a fit is, and what can be done with it; None where the fit wrote none.

    All ranks must call: the log folder is broadcast. What rank 0 returns is right.

    Args:
        trainer: after its fit.
        module: what was trained.
    """
    config = Path(trainer.log_dir or ".") / "config.yaml"
    written = [
        path
        for callback in _model_checkpoints(trainer)
        for path in (callback.last_model_path, callback.best_model_path)
        if path and os.path.exists(path)
    ]
    if not written:
        return None
    diverged = _not_finite(module.parameters())
    path = next((path for path in written if not (diverged and _holds_not_finite(path))), None)
    if path is None:
        return f"The checkpoint {_short(Path(written[0]))} is not finite (NaN or infinity): the training diverged"
    given = f"--config {shlex.quote(_short(config))} " if config.is_file() else ""
    given += f"--ckpt_path {shlex.quote(_short(Path(path)))}"
    tested = type(module).test_step is not LightningModule.test_step
    which = "last finite checkpoint" if diverged else "checkpoint"
    lines = [f"The {which} is {_short(Path(path))}", f"To score it: dpp {'test' if tested else 'validate'} {given}"]
    if declared(module, "pretrained") is not None:  # else a sweep would not know the base
        lines.append(f"To prune it: dpp sweep {given}{'' if tested else ' --split validation'} --output DIR")
    return "\n".join(lines)


def _model_checkpoints(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    return (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))


def _not_finite(tensors: Iterable[object]) -> bool:
    """Whether a tensor that a rank has whole holds NaN or infinity."""
    return any(
        isinstance(t, torch.Tensor) and t.is_floating_point() and not is_dtensor(t) and not is_finite(t.detach())
        for t in tensors
    )


def _holds_not_finite(path: str) -> bool:
    """Whether a checkpoint in one file, which this fit wrote, holds weights with NaN or infinity."""
    if os.path.isdir(path):
        return False
    return _not_finite(torch.load(path, map_location="cpu", weights_only=False)["state_dict"].values())


def _short(path: Path) -> str:
    """A path as the user would type it: from the working folder on where it lies inside."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
