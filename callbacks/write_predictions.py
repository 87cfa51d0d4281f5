"""WritePredictions: what a model predicts as readable lines of one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpp_lightning.storage.atomic_write import atomic_file, check_writable

PREDICTIONS_FILE = "predictions.jsonl"


class WritePredictions(BasePredictionWriter):
    """Write one JSON object a sample, in the data's order: its number, and what is readable of sample and prediction.

    What is readable the DataModule says: ``describe_prediction(index, prediction, dataloader_idx) -> dict`` (the
    sentence, the label's name, a generated text with its reference); without it a line holds the prediction alone. The
    file appears whole, when all ranks are done. ``dpp predict`` has this callback by itself.

    Args:
        path: file; default ``predictions.jsonl`` in the trainer's log folder.

    Raises:
        OSError: in ``setup``: the file cannot be written.
        ValueError: a prediction step that returns something else than a tensor (samples, ...) or a list.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a folder that cannot be written before the first prediction."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and trainer.is_global_zero:
            check_writable(self._file(trainer).parent)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Bring the ranks' lines together and write them."""
        several = len(batch_indices) > 1  # one entry a loader, unlike the predictions of a single one
        by_loader = predictions if several else [predictions]
        lines = [
            {**({"dataloader": number} if several else {}), "index": index, **_described(trainer, index, value, number)}
            for number, (batches, places) in enumerate(zip(by_loader, batch_indices, strict=True))
            for batch, indices in zip(batches, places, strict=True)
            for index, value in zip(indices, _samples(batch), strict=True)
        ]
        lines = sorted(_from_all_ranks(lines), key=lambda line: (line.get("dataloader", 0), line["index"]))
        if not trainer.is_global_zero:
            return
        file = self._file(trainer)
        with atomic_file(file) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        rank_zero_info(f"{len(lines)} predictions are in {file}")

    def _file(self, trainer: pl.Trainer) -> Path:
        return Path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / PREDICTIONS_FILE)


def _described(trainer: pl.Trainer, index: int, value: Any, dataloader_idx: int) -> dict[str, Any]:
    describe = getattr(trainer.datamodule, "describe_prediction", None)  # type: ignore[attr-defined]
    return {"prediction": value} if describe is None else describe(index, value, dataloader_idx)


def _samples(batch: Any) -> list[Any]:
    """The predictions of a batch as plain values, one a sample."""
    if isinstance(batch, Tensor):
        return batch.tolist()  # type: ignore[no-any-return]
    if isinstance(batch, list | tuple):
        return [value.tolist() if isinstance(value, Tensor) else value for value in batch]
    raise ValueError(
        f"predict_step returned {type(batch).__name__}, expected a tensor (samples, ...) or a list, one value a sample"
    )


def _from_all_ranks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return lines
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lines)
    return [line for of_rank in gathered for line in of_rank]
