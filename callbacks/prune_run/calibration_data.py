"""Where the data that q is searched on comes from: never the split that is scored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader


def labelled_loader(trainer: pl.Trainer, given: Iterable[Any] | None) -> tuple[Any, str]:
    """Labelled data for the objective ``metric``: the loader, and what it is for the table.

    Raises:
        ValueError: there is none: q would have to be chosen on the split that is scored, or on data trained on.
    """
    if given is not None:
        return given, "calibration_dataloader="
    make = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if make is None:
        raise ValueError(
            "objective='metric' needs labelled data that was neither trained on nor is scored: give the DataModule a "
            "calibration_dataloader(), or pass calibration_dataloader=; or take objective='output_change' (no labels)"
        )
    return make(), "calibration split"


def calibration_batch(trainer: pl.Trainer, given: Iterable[Any] | None, samples: int) -> tuple[Any, str]:
    """One fixed batch for the output change, and what it is for the table.

    The same items whatever the world size: by index from the dataset, not through a sharded or shuffled loader.
    Without a calibration loader they come from the training data, spread evenly over it; labels play no part.

    Args:
        trainer: with its loaders attached.
        given: the user's loader, if any.
        samples: how many items; fewer if the data has fewer.

    Raises:
        ValueError: no calibration and no training data.
    """
    make = getattr(trainer.datamodule, "calibration_dataloader", None)  # type: ignore[attr-defined]
    if given is not None:
        return _take(given, samples, "calibration_dataloader=")
    if make is not None:
        return _take(make(), samples, "the calibration split")
    source = trainer.fit_loop._data_source
    loader = trainer.train_dataloader or (source.dataloader() if source.instance is not None else None)
    if not isinstance(loader, DataLoader):
        raise ValueError(
            "the output change needs one batch of data: pass calibration_dataloader=, give the DataModule a "
            f"calibration_dataloader(), or use a single training DataLoader (found {type(loader).__name__})"
        )
    return _take(loader, samples, "train", spread=True)


def _take(loader: Iterable[Any], samples: int, source: str, *, spread: bool = False) -> tuple[Any, str]:
    dataset = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or collate is None:
        return next(iter(loader)), f"the first batch of {source}"
    length = len(dataset)  # type: ignore[arg-type]
    count = min(samples, length)
    step = length // count if spread and count else 1
    return collate([dataset[i * step] for i in range(count)]), f"{count} items of {source}"  # type: ignore[index]
