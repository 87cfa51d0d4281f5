"""Steps that are functions of (seed, epoch, step), so that a run killed and resumed anywhere equals an unbroken one.

A Lightning checkpoint holds no state of random generators, and none is needed here. :class:`EpochSampler` draws the
order of an epoch from (seed, epoch). :class:`EpochDataLoader` draws it no earlier than the first batch is asked for,
and puts the number of batches given out into the checkpoint. :func:`seed_step`, called in ``on_train_batch_start``,
makes dropout a function of (seed, epoch, batch, rank), and :func:`item_seed` makes the augmentation of a sample a
function of (seed, epoch, sample).
"""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

IGNORED_LABEL = -100  # ignore_index of cross_entropy: samples that only fill up the last step of some ranks have it

_BATCHES_PER_POOL = 50  # length grouping sorts within pools of this many batches: short padding, still random order


def resolve_seed(seed: int | None) -> int:
    """The seed given, else the one of Lightning's ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def seed_step(seed: int, epoch: int, batch: int, rank: int = 0) -> None:
    """Seed the global generators of torch (CPU and CUDA), numpy and Python as a function of the four numbers.

    To be called in ``on_train_batch_start``.

    Args:
        seed: any integer.
        epoch: ``trainer.current_epoch``.
        batch: number of the batch within the epoch, from 0.
        rank: ``trainer.global_rank``.
    """
    step_seed = _mix(seed, epoch, f"batch {batch} rank {rank}")
    torch.default_generator.manual_seed(step_seed)
    if torch.cuda.is_initialized():  # torch.manual_seed also spends 0.1 ms on preparing devices that are not used
        torch.cuda.manual_seed_all(step_seed)
    np.random.seed(step_seed % 2**32)
    random.seed(step_seed)


def restore_positions(trainer: Trainer) -> None:
    """Let the training loaders continue at the checkpoint's position; to be called in ``on_train_start``.

    Lightning does so itself, but too early where the loaders are made before the checkpoint is restored: a schedule
    that asks for the number of all steps makes them (Lightning's issue 20550). A second call does nothing.
    """
    trainer.fit_loop._load_combined_loader_states()


@contextmanager
def item_seed(seed: int, epoch: int, item: int) -> Iterator[None]:
    """Inside the block torch's CPU generator is a function of (seed, epoch, item); after it, the generator continues as
    if the block had drawn nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_mix(seed, epoch, f"item {item}"))
        yield


class EpochSampler(DistributedSampler[int]):
    """A shuffled order of ``range(dataset_len)`` that depends on (seed, epoch) alone, dealt out to the ranks.

    It is a ``DistributedSampler``, so that Lightning uses it as it is, in one process and in many, and does not wrap it
    in a second one. Rank r of R takes the entries r, r+R, r+2R, ... of the order. As in torch, the order is filled up
    from its start where its length is no multiple of R, so that all ranks take equally many steps.

    Args:
        dataset_len: number of samples n.
        seed: any integer.
        lengths: length of each sample (n numbers); given, batches hold samples of similar length: the shuffled order is
            cut into pools of 50 batches, each sorted by length, and the batches are shuffled again.
        batch_size: samples of one batch on one rank; only ``lengths`` needs it.
        num_replicas: number of ranks R; a Trainer knows it as ``trainer.distributed_sampler_kwargs``.
        rank: which of them, in [0, R).

    Attributes:
        start: how many of this rank's entries the next iteration skips; :class:`EpochDataLoader` sets it.

    Raises:
        ValueError: ``lengths`` of another size than the dataset, a batch size below 1, or a rank outside [0, R).
    """

    def __init__(
        self,
        dataset_len: int,
        seed: int = 0,
        *,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if lengths is not None and len(lengths) != dataset_len:
            raise ValueError(f"got {len(lengths)} lengths for {dataset_len} samples; give one length per sample")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        super().__init__(range(dataset_len), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch, 0))
        order = torch.randperm(self.total_size - self._missing, generator=generator)
        order = torch.cat([order, order.repeat(-(-self._missing // max(1, len(order))))[: self._missing]])
        if self.lengths is not None:
            order = _group_by_length(order, self.lengths, self.batch_size * self.num_replicas, generator)
        return iter(order[self.rank :: self.num_replicas][self.start :].tolist())

    @property
    def _missing(self) -> int:
        return self.total_size - len(self.dataset)  # type: ignore[arg-type]


class EvaluationSampler(DistributedSampler[int]):
    """``range(dataset_len)`` in order, dealt out to the ranks, with fillers marked: index i comes as -1 - i.

    All ranks must take equally many steps, so some repeat samples in their last step. A dataset that gives samples of
    a negative index a label to ignore keeps them out of the metrics.

    Args:
        dataset_len: number of samples n.
        num_replicas: number of ranks R.
        rank: which of them, in [0, R).
    """

    def __init__(self, dataset_len: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(dataset_len), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)  # type: ignore[arg-type]
        indices = range(self.rank, self.total_size, self.num_replicas)
        return iter([i if i < n else -1 - i % n for i in indices])


class EpochDataLoader(DataLoader[Any]):
    """A ``DataLoader`` whose order is drawn with its first batch, and that continues in the middle of an epoch.

    Torch's own loader asks the sampler for an order, and the global generator for a number, when its iterator is made.
    In a resumed fit Lightning makes the iterator before it sets the sampler's epoch: workers would then prefetch the
    order of epoch 0. The epoch is passed on to a dataset with ``set_epoch``. Workers have the epoch in which they were
    started, so they must not be persistent with such a dataset.

    Lightning keeps ``state_dict()`` in its checkpoints: how many batches of which epoch were given out. In the fit of a
    module that calls :func:`restore_positions` the loader then gives the batches that are left, on any number of ranks
    that together take as many samples in a step. With an :class:`EpochSampler` the batches before them are not read.
    """

    # class attributes, as Lightning calls __init__ a second time to put a sampler in
    _given = (-1, 0)  # the epoch, and how many of its batches were given out
    _resumed: Mapping[str, int] = {"epoch": -1}  # the state of the checkpoint

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = getattr(self.sampler, "epoch", 0)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        skipped = self._batches_before(epoch)
        self._resumed, self._given = {"epoch": -1}, (epoch, skipped)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start, skipped = skipped * (self.batch_size or 1), 0
        for batch in islice(super().__iter__(), skipped, None):
            self._given = (epoch, self._given[1] + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """``epoch``, ``batches`` given out in it, and ``samples_per_step`` of all ranks together."""
        return {"epoch": self._given[0], "batches": self._given[1], "samples_per_step": self._samples_per_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the epoch of a :meth:`state_dict` begin after the batches that were given out."""
        self._resumed = state_dict

    def _batches_before(self, epoch: int) -> int:
        """How many batches of an epoch were given out before the checkpoint.

        Raises:
            ValueError: a step has another number of samples than at the checkpoint, so the batches do not line up.
        """
        if self._resumed["epoch"] != epoch or not self._resumed["batches"]:
            return 0
        if self._resumed["samples_per_step"] != self._samples_per_step:
            raise ValueError(
                "the checkpoint is of the middle of an epoch whose steps had "
                f"{self._resumed['samples_per_step']} samples on all ranks together, here they have "
                f"{self._samples_per_step}: set batch_size so that both are equal, or resume from a checkpoint of an "
                "epoch's end"
            )
        return self._resumed["batches"]

    @property
    def _samples_per_step(self) -> int:
        return (self.batch_size or 1) * getattr(self.sampler, "num_replicas", 1)


def _group_by_length(
    order: torch.Tensor, lengths: torch.Tensor, batch_size: int, generator: torch.Generator
) -> torch.Tensor:
    pools = order.split(batch_size * _BATCHES_PER_POOL)
    batches = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    short = batches.pop() if batches and len(batches[-1]) < batch_size else None  # a short batch stays the last one
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    batches = shuffled if short is None else [*shuffled, short]
    return torch.cat(batches) if batches else order


def _mix(seed: int, epoch: int, stream: int | str) -> int:
    """63 bits from three values; unlike a sum, (seed 0, epoch 1) and (seed 1, epoch 0) share nothing."""
    digest = blake2b(f"{seed} {epoch} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
