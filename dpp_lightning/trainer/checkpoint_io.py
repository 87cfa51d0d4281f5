"""Checkpoints of a run: files that appear whole, and the same one on all ranks."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dpp_lightning.storage.atomic_write import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints of one file, written beside their final name and renamed.

    Lightning writes them in the folder for temporary files and moves them; where that is on another file system, a
    process killed meanwhile leaves part of a file under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a local file; any other place is Lightning's own job."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(Path(path), suffix=".part") as temporary:
            torch.save(checkpoint, temporary)


class SameCheckpoint(Callback):
    """Refuses a checkpoint that only some ranks see: with ``last`` the others would start anew, and all would hang.

    Args:
        path: as given to the trainer, None where it loads no checkpoint.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask all ranks before any of them loads it.

        Raises:
            ValueError: on every rank, if only some of them see it; if ``last`` is to be scored and there is none.
        """
        exists = self._exists(trainer)
        all_of = trainer.strategy.reduce_boolean_decision
        if all_of(exists, all=False) != all_of(exists):
            raise ValueError(
                f"rank {trainer.global_rank} finds {'the' if exists else 'no'} checkpoint --ckpt_path {self.path}, but "
                "not all ranks agree: put it in the same place on every node, or in a folder that all nodes share"
            )
        if self.path == "last" and not exists and stage != "fit":
            raise ValueError(
                "--ckpt_path last: there is no last.ckpt in the folders of this config's checkpoints, so an untrained "
                "model would be scored; give the file itself"
            )

    def _exists(self, trainer: Trainer) -> bool:
        if self.path != "last":
            return self.path is not None and Path(self.path).exists()
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        return any(saver._find_last_checkpoints(trainer) for saver in savers)
