"""What ``dpp fit`` says of checkpoints: of an earlier fit's before it starts, and at its end where its own is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


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
    ]
    path = next((path for path in written if path and os.path.exists(path)), None)
    if path is None:
        return None
    given = f"--config {shlex.quote(_short(config))} " if config.is_file() else ""
    given += f"--ckpt_path {shlex.quote(_short(Path(path)))}"
    tested = type(module).test_step is not LightningModule.test_step
    lines = [f"The checkpoint is {_short(Path(path))}", f"To score it: dpp {'test' if tested else 'validate'} {given}"]
    if getattr(module, "pretrained", None) is not None:  # else a sweep would not know the base
        lines.append(f"To prune it: dpp sweep {given}{'' if tested else ' --split validation'} --output DIR")
    return "\n".join(lines)


def _model_checkpoints(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    return (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint))


def _short(path: Path) -> str:
    """A path as the user would type it: from the working folder on where it lies inside."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)
