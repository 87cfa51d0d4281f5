"""Checkpoints of a run: files that appear whole or not at all, and the same checkpoint on all ranks."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dpp_lightning.storage.atomic_write import atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints of one file, written under a temporary name beside the final one and then renamed.

    Lightning itself writes them in the system's folder for temporary files and moves them. Where that is on another
    file system, moving is copying, and a process that is killed meanwhile leaves part of a file under the final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a local file; an address such as ``s3://...`` is left to Lightning.

        Args:
            checkpoint: what ``torch.save`` writes.
            path: the final name.
            storage_options: of the address.

        Raises:
            OSError: if the file cannot be written. A file that had the name before is left as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(Path(path), suffix=".part") as temporary:
            _save(checkpoint, temporary)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    """``torch.save`` that raises the system's own error: given a path, it says of a full disk ``unexpected pos 64``.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # of the end of the file, which is written all the same
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


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
