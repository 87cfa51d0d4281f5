"""WritePredictions: a model's predictions as readable lines of one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpp_lightning.storage.atomic_write import atomic_file, check_writable
from dpp_lightning.storage.locate import local_path

PREDICTIONS_FILE = "predictions.jsonl"


class WritePredictions(BasePredictionWriter):
    """Write one JSON object per sample, in the order of the data: the sample's index and a readable prediction.

    A DataModule may describe a prediction with ``describe_prediction(index, prediction, dataloader_idx) -> dict``, such
    as the sentence with its label's name, or a generated text with its reference. Without that method a line holds the
    prediction alone. With several dataloaders each line also holds ``dataloader``, the loader's index. Rank 0 writes
    the file when all ranks are done, so it is never half written. ``dpp predict`` adds this callback by itself.

    Args:
        path: the file; default ``predictions.jsonl`` in the trainer's log folder.

    Raises:
        OSError: in ``setup``, if the file cannot be written.
        ValueError: at the first batch, if ``predict_step`` returns anything but a tensor of shape (samples, ...), a
            list with an item for each sample, or a tuple or dict of tensors of shape (samples, ...).
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("epoch")
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that the file can be written before the first prediction is made."""
        super().setup(trainer, pl_module, stage)
        path = self._path(trainer)
        if stage == "predict" and trainer.is_global_zero:
            check_writable(path.parent)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Refuse predictions that cannot be written when the first batch of them is there."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if batch_idx > 0:
            return
        found, seen = _samples(outputs), trainer.predict_loop.epoch_batch_indices[dataloader_idx]
        if seen and len(seen[-1]) != len(found):  # of a stream there are none
            raise ValueError(
                f"predict_step returned {len(found)} predictions for a batch of {len(seen[-1])}: expected a tensor "
                "(samples, ...), a list with an item for each sample, or a tuple or dict of such tensors"
            )
        json.dumps(found)

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the lines of all ranks and write them on rank 0."""
        several = len(batch_indices) > 1
        # with several loaders Lightning gives one list of batches per loader, with a single one just the batches
        batches_by_loader = predictions if several else [predictions]
        lines = [
            {
                **({"dataloader": loader_index} if several else {}),
                "index": index,
                **_described(trainer, index, prediction, loader_index),
            }
            for loader_index, (batches, indices_by_batch) in enumerate(
                zip(batches_by_loader, batch_indices, strict=True)
            )
            for batch, indices in zip(batches, _indices(trainer, batches, indices_by_batch), strict=True)
            for index, prediction in zip(indices, _samples(batch), strict=True)
        ]
        path = self._path(trainer)
        lines = sorted(_gathered(lines), key=lambda line: (line.get("dataloader", 0), line["index"]))
        if not trainer.is_global_zero:
            return
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
        rank_zero_info(f"{len(lines)} predictions are in {path}")

    def _path(self, trainer: pl.Trainer) -> Path:
        """All ranks must call: the log folder is broadcast."""
        return local_path(self.path or Path(trainer.log_dir or trainer.default_root_dir) / PREDICTIONS_FILE)


def _described(trainer: pl.Trainer, index: int, prediction: Any, dataloader_idx: int) -> dict[str, Any]:
    """A prediction as the DataModule describes it, else as it is."""
    describe = getattr(trainer.datamodule, "describe_prediction", None)  # type: ignore[attr-defined]
    return {"prediction": prediction} if describe is None else describe(index, prediction, dataloader_idx)


def _indices(trainer: pl.Trainer, batches: Sequence[Any], indices: Sequence[Any]) -> Sequence[Any]:
    """Of each batch the indices of its samples; of a stream, which has none, their numbers as they came.

    Raises:
        ValueError: a stream on several ranks.
    """
    if len(indices) == len(batches):
        return indices
    if trainer.world_size > 1:
        raise ValueError(
            f"a stream's samples have no order over {trainer.world_size} ranks: predict on one (trainer.devices: 1)"
        )
    ends = list(accumulate((len(_samples(batch)) for batch in batches), initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def _samples(batch: Any) -> list[Any]:
    """The predictions of a batch as plain values, one per sample.

    Raises:
        ValueError: of which no sample can be told.
    """
    if isinstance(batch, Mapping) and batch:
        return [dict(zip(batch, values, strict=True)) for values in _rows([*batch.values()])]
    if isinstance(batch, tuple) and batch:
        return [list(values) for values in _rows(batch)]
    if isinstance(batch, list) or (_has_rows(batch) and len(batch.shape)):
        return [_plain(value) for value in batch]
    raise ValueError(
        f"predict_step returned {type(batch).__name__}, expected a tensor (samples, ...), a list with an item for each "
        "sample, or a tuple or dict of such tensors"
    )


def _rows(columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """What several tensors or lists hold of each sample."""
    of_each = [_samples(column) for column in columns]
    if len({*map(len, of_each)}) > 1:
        raise ValueError(
            f"predict_step returned columns of {[*map(len, of_each)]} items: expected one item for each sample in each"
        )
    return [*zip(*of_each, strict=True)]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _plain(value: Any) -> Any:
    """A value of JSON, whatever tensors are in it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tolist() if _has_rows(value) or isinstance(value, np.generic) else value


def _gathered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all ranks, on every rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return lines
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, lines)
    return [line for rank_lines in gathered for line in rank_lines]
