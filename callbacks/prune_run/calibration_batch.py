"""One batch of calibration data, taken so that the loader, its data and all random generators stay as they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

CURE = (
    "pass DeltaPruneCallback(calibration_dataloader=...) with batches as validation_step takes them, or give the "
    "DataModule such a calibration_dataloader()"
)
_KNOWN_LOADERS = ("torch", "torchdata", "dpp_lightning")  # their own iteration collates items as torch's does


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch, on the CPU unless its loader puts it elsewhere.

    Attributes:
        batch: as the loader gives it; of several loaders a collection of their batches.
        source: which data it is, for the results.
        parts: of several loaders the batch of each, with its source; else empty.
    """

    batch: Any
    source: str
    parts: tuple[CalibrationBatch, ...] = ()


def batch_of_items(loaders: Any, samples: int, source: str, *, spread: bool = False) -> CalibrationBatch | None:
    """A batch collated from items of the loaders' datasets, whatever their batch size, order and number of ranks.

    Only items that the loaders draw are taken: those of a sampler that draws from a subset are of that subset.

    Args:
        loaders: a loader, or several in a ``CombinedLoader``, a mapping or a sequence.
        samples: how many items of each; fewer if the data has fewer.
        source: name of the data.
        spread: take items at equal distances, not the first ones.

    Returns:
        None where only the loaders' own batches will do: streams, samplers and batch samplers of another kind,
        ``batch_size=None``, loaders that iterate in a way of their own, and items that do not collate.

    Raises:
        ValueError: if a dataset is empty.
    """
    leaves, spec = _flat(loaders)
    taken = []
    for key, loader in leaves:
        with generators_kept(loader), isolate_rng():
            collated = _collated(loader, samples, f"{source}{key}", spread)
        if collated is None:
            return None
        taken.append(CalibrationBatch(*collated))
    return taken[0] if spec is None else _joined(taken, spec, source)


def own_batch(loaders: Any, source: str) -> CalibrationBatch:
    """The first batch that the loaders give, each iterated anew.

    Args:
        loaders: see :func:`batch_of_items`. They must not be iterated elsewhere at the time.
        source: name of the data.

    Raises:
        ValueError: if a loader gives none.
    """
    leaves, spec = _flat(loaders)
    taken = []
    for key, loader in leaves:
        with generators_kept(loader), isolate_rng():
            try:
                batch = next(iter(loader))
            except StopIteration:
                raise ValueError(f"{source}{key} gives no batch, but one is needed for calibration: {CURE}") from None
        taken.append(CalibrationBatch(batch, f"the first batch of {source}{key}"))
    return taken[0] if spec is None else _joined(taken, spec, f"{source} (its first batches)")


class FirstTrainingBatch:
    """Keeps a copy of the first batch that training draws, as it passes. Nothing is drawn for it.

    Args:
        trainer: in ``on_train_start``.

    Raises:
        ValueError: if the module's ``training_step`` draws batches itself.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        fetcher: Any = trainer.fit_loop._data_fetcher
        if hasattr(fetcher, "iterator_wrapper"):
            raise ValueError(
                f"the training batches are drawn by training_step(dataloader_iter), so none can be seen before: {CURE}"
            )
        self._loaders, self._fetcher, self._kept = fetcher.combined_loader, fetcher, None
        self._iterator: Iterator[Any] | None = None
        if getattr(fetcher, "batches", None):  # of a stream Lightning has drawn the first batch by now
            self._keep(fetcher.batches[0])
        else:
            self._iterator, fetcher.iterator = fetcher.iterator, self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        assert self._iterator is not None
        item = next(self._iterator)
        self._keep(item)
        self._fetcher.iterator = self._iterator  # Lightning draws the others from the loaders again
        return item

    def _keep(self, item: tuple[Any, int, int]) -> None:
        self._kept = deepcopy(item[0])

    def take(self) -> CalibrationBatch:
        """The copy, once training has drawn the batch."""
        batch, source = self._kept, "the first batch of train"
        leaves, spec = _flat(self._loaders)
        if spec is None:
            return CalibrationBatch(batch, source)
        batches = spec.flatten_up_to(batch)
        parts = [CalibrationBatch(b, f"{source}{key}") for b, (key, _) in zip(batches, leaves, strict=True)]
        return CalibrationBatch(batch, source, tuple(parts))


def _flat(loaders: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Each loader with its key in the collection, and the collection's structure; None for a single loader."""
    tree = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    paths, spec = tree_flatten_with_path(tree)
    several = isinstance(loaders, CombinedLoader) or (paths and all(isinstance(leaf, DataLoader) for _, leaf in paths))
    if not several or spec.is_leaf():
        return [("", tree)], None
    return [(keystr(path), leaf) for path, leaf in paths], spec


def _joined(taken: list[CalibrationBatch], spec: Any, source: str) -> CalibrationBatch:
    counts = {part.source.partition(" items of ")[0] for part in taken}
    named = f"{counts.pop()} items each of {source}" if len(counts) == 1 and " items of " in taken[0].source else source
    return CalibrationBatch(tree_unflatten([part.batch for part in taken], spec), named, tuple(taken))


def _collated(loader: Any, samples: int, source: str, spread: bool) -> tuple[Any, str] | None:
    """Items of one loader's dataset as a batch, with a description; None where its own batches must be taken."""
    indices = _drawn_indices(loader)
    if indices is None:
        return None
    if not len(indices):
        raise ValueError(f"{source} holds no items, but a batch of it is needed for calibration: {CURE}")
    count = min(samples, len(indices))
    step = len(indices) // count if spread else 1
    items = [loader.dataset[indices[i * step]] for i in range(count)]
    try:
        return loader.collate_fn(items), f"{count} items of {source}"
    except Exception:  # items of several lengths: a user's collate_fn may fail in any way, so its own batches are taken
        return None


def _drawn_indices(loader: Any) -> Sequence[int] | None:
    """Indices of the items that a loader draws in an epoch, in the dataset's order; None where it does not tell."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader.batch_sampler) is not BatchSampler and not _is_lightnings(loader.batch_sampler):
        return None
    own_iteration = next(kind for kind in type(loader).__mro__ if "__iter__" in vars(kind))
    if own_iteration.__module__.partition(".")[0] not in _KNOWN_LOADERS:
        return None
    sampler: Any = loader.batch_sampler.sampler  # type: ignore[union-attr]
    if isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
        sampler = sampler.dataset._sampler  # Lightning deals out the indices of the user's sampler
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return [int(index) for index in sampler.weights.nonzero().flatten()]
    if isinstance(sampler, DistributedSampler) or type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    return None


def _is_lightnings(batch_sampler: Any) -> bool:
    """Whether Lightning made a batch sampler from torch's own to know its last batch."""
    return isinstance(batch_sampler, BatchSampler) and type(batch_sampler).__module__.startswith("lightning.")


@contextmanager
def generators_kept(loader: Any) -> Iterator[None]:
    """Random generators that a loader, its samplers, its dataset or their transforms hold draw the same after it."""
    generators = list(_generators(loader))
    states = [_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            _set_state(generator, state)


def _generators(root: Any, depth: int = 6) -> Iterable[Any]:
    """The random generators in an object's attributes, and in the lists, tuples and mappings there."""
    seen: set[int] = set()
    level = [root]
    for _ in range(depth):
        below: list[Any] = []
        for item in level:
            if id(item) in seen or isinstance(item, torch.Tensor | np.ndarray | str | bytes | int | float | type):
                continue
            seen.add(id(item))
            if isinstance(item, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
                yield item
            elif isinstance(item, list | tuple):
                below += item[:64]
            elif isinstance(item, dict):
                below += list(item.values())[:64]
            else:
                below += list(getattr(item, "__dict__", {}).values())
        level = below


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else deepcopy(generator.get_state())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
