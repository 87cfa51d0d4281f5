"""Where the data that q is searched on comes from. It is never the split that is scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader


def labelled_loader(trainer: pl.Trainer, dataloader: Iterable[Any] | None) -> tuple[Any, str]:
    """Labelled data for the objective ``metric``: a loader, and the name of its data for the results.

    Args:
        trainer: with its DataModule, if it has one.
        dataloader: the one that the user gave; default the DataModule's ``calibration_dataloader()``.

    Raises:
        ValueError: if there is neither: q would have to be chosen on the split that is scored or on training data.
    """
    if dataloader is not None:
        return dataloader, "calibration_dataloader="
    make_loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if make_loader is None:
        raise ValueError(
            "objective='metric' needs labelled data that was neither trained on nor is scored: give the DataModule a "
            "calibration_dataloader(), or pass calibration_dataloader=; or take objective='output_change' (no labels)"
        )
    return make_loader(), "calibration split"


def calibration_batch(trainer: pl.Trainer, dataloader: Iterable[Any] | None, samples: int) -> tuple[Any, str]:
    """One fixed batch for the output change, and the name of its data for the results.

    Its samples are taken by index from the dataset, not through a sharded or shuffled loader, so they are the same for
    every number of ranks. Labels play no part.

    Args:
        trainer: with its loaders attached.
        dataloader: the one that the user gave; default the DataModule's ``calibration_dataloader()``, else the training
            data, of which samples at equal distances are taken.
        samples: how many; fewer if the data has fewer.

    Raises:
        ValueError: if there is neither calibration data nor a single training DataLoader.
    """
    if dataloader is not None:
        return _collate_first(dataloader, samples, "calibration_dataloader=")
    make_loader = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if make_loader is not None:
        return _collate_first(make_loader(), samples, "the calibration split")
    source = trainer.fit_loop._data_source
    training = trainer.train_dataloader or (source.dataloader() if source.instance is not None else None)
    if not isinstance(training, DataLoader):
        raise ValueError(
            "the output change needs one batch of data: pass calibration_dataloader=, give the DataModule a "
            f"calibration_dataloader(), or use a single training DataLoader (found {type(training).__name__})"
        )
    return _collate_first(training, samples, "train", spread=True)


def _collate_first(loader: Iterable[Any], samples: int, source: str, *, spread: bool = False) -> tuple[Any, str]:
    """The first samples of the loader's dataset, or samples spread over it, as one batch; with a description of them.

    A loader without an indexable dataset gives its first batch, whatever its size.
    """
    dataset = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or collate is None:
        return next(iter(loader)), f"the first batch of {source}"
    length = len(dataset)  # type: ignore[arg-type]
    count = min(samples, length)
    step = length // count if spread and count else 1
    return collate([dataset[i * step] for i in range(count)]), f"{count} items of {source}"  # type: ignore[index]
