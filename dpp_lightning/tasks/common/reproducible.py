"""Steps that are functions of (seed, epoch, step), so that a run killed and resumed anywhere equals the whole one.

A Lightning checkpoint holds no state of random generators, and here none is needed: :class:`EpochSampler` draws the
order of an epoch from (seed, epoch), :class:`EpochDataLoader` draws it when the first batch is asked for and not
earlier, and puts the number of batches given out into the checkpoint, :func:`seed_step`, called in
``on_train_batch_start``, makes dropout a function of (seed, epoch, batch, rank), and :func:`item_seed` the augmentation
of a sample one of (seed, epoch, sample).
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
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

IGNORED_LABEL = -100  # cross_entropy's own ignore_index: samples that only fill up the last step of some ranks

_BATCHES_PER_POOL = 50  # length grouping sorts within pools of this many batches: short padding, still random order


def resolve_seed(seed: int | None) -> int:
    """The seed given, else the one of Lightning's ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def seed_step(seed: int, epoch: int, batch: int, rank: int = 0) -> None:
    """Seed the global generators of torch (CPU and CUDA), numpy and Python as a function of the four numbers.

    To be called in ``on_train_batch_start`` with ``trainer.current_epoch``, its ``batch_idx`` and
    ``trainer.global_rank``.
    """
    mixed = _mix(seed, epoch, f"batch {batch} rank {rank}")
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # torch.manual_seed also takes 0.1 ms to prepare devices that are not used
        torch.cuda.manual_seed_all(mixed)
    np.random.seed(mixed % 2**32)
    random.seed(mixed)


def restore_positions(trainer: Trainer) -> None:
    """Let the training loaders go on where the checkpoint's were; to be called in ``on_train_start``.

    Lightning itself does it too early where the loaders were made before the checkpoint was restored, as a schedule
    over all steps has them made (its issue 20550); a second time does nothing.
    """
    trainer.fit_loop._load_combined_loader_states()


class ReproducibleModule(LightningModule):
    """A module whose training steps are functions of (seed, epoch, step, rank), also in a fit that is resumed.

    Attributes:
        seed: set by the subclass.
    """

    seed: int

    def on_train_start(self) -> None:
        """Go on at the checkpoint's place in its epoch."""
        restore_positions(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what this step draws (dropout, mixup) a function of (seed, epoch, step, rank)."""
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)


@contextmanager
def item_seed(seed: int, epoch: int, item: int) -> Iterator[None]:
    """Inside the block torch's CPU generator is a function of (seed, epoch, item); behind it, it goes on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_mix(seed, epoch, f"item {item}"))
        yield


class EpochSampler(DistributedSampler[int]):
    """A shuffled order of ``range(dataset_len)`` that depends on (seed, epoch) alone, dealt out to the ranks.

    It is a ``DistributedSampler``, so Lightning leaves it in place, in one process and in many, instead of shuffling
    once more around it. Rank r of R takes the entries r, r+R, r+2R, ... of the order; as in torch, the order is filled
    up from its start where its length is no multiple of R, so that all ranks take equally many steps.

    Args:
        dataset_len: number of samples n.
        seed: any integer.
        lengths: length of each sample (n numbers); given, batches hold samples of similar length: the shuffled order is
            cut into pools of 50 batches, each sorted by length, and the batches are shuffled again.
        batch_size: samples of one batch on one rank; only ``lengths`` needs it.
        num_replicas: number of ranks R; a Trainer knows it as ``trainer.distributed_sampler_kwargs``.
        rank: which of them, in [0, R).

    Attributes:
        start: how many of this rank's entries the next iteration leaves out; :class:`EpochDataLoader` sets it.

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
    """``range(dataset_len)`` in order, dealt out to the ranks, with the fillers marked: position i comes as -1 - i.

    All ranks must take equally many steps, so the last steps of some repeat samples; a dataset that gives negative
    indices a label to ignore keeps these out of the metrics.

    Args:
        dataset_len: number of samples n.
        num_replicas: number of ranks R.
        rank: which of them, in [0, R).
    """

    def __init__(self, dataset_len: int, *, num_replicas: int, rank: int) -> None:
        super().__init__(range(dataset_len), num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)  # type: ignore[arg-type]
        positions = range(self.rank, self.total_size, self.num_replicas)
        return iter([i if i < n else -1 - i % n for i in positions])


class EpochDataLoader(DataLoader[Any]):
    """A ``DataLoader`` whose iterator starts at its first batch, and that goes on in the middle of an epoch.

    Torch's asks the sampler for an order, and the global generator for a number, when the iterator is made. In a
    resumed fit Lightning makes it before it has set the sampler's epoch: workers would then prefetch the order of
    epoch 0. A dataset with ``set_epoch`` is told the sampler's epoch; workers have it as it was when they started, so
    they must not be persistent then.

    Lightning keeps ``state_dict()`` in its checkpoints: how many batches of which epoch were given out. A fit of a
    module that calls :func:`restore_positions` then gets the batches that are left, on any number of ranks with as many
    samples in a step of all; with an :class:`EpochSampler` the others are not read.
    """

    _given = (-1, 0)  # epoch and batches of it that were given out; class attributes, as Lightning calls __init__ anew
    _resumed: Mapping[str, int] = {"epoch": -1}  # the checkpoint's state

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = getattr(self.sampler, "epoch", 0)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        done = self._done(epoch)
        self._resumed, self._given = {"epoch": -1}, (epoch, done)
        unread = done
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start, unread = done * (self.batch_size or 1), 0
        for batch in islice(super().__iter__(), unread, None):
            self._given = (epoch, self._given[1] + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches given out in it, and samples in a step of all ranks together."""
        return {"epoch": self._given[0], "batches": self._given[1], "samples_per_step": self._samples_per_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the epoch named begin behind the batches that were given out; see :meth:`state_dict`."""
        self._resumed = state_dict

    def _done(self, epoch: int) -> int:
        """How many batches of an epoch the checkpoint's fit has had.

        Raises:
            ValueError: as many batches are another number of samples here.
        """
        if self._resumed["epoch"] != epoch or not self._resumed["batches"]:
            return 0
        if self._resumed["samples_per_step"] != self._samples_per_step:
            raise ValueError(
                "the checkpoint is of the middle of an epoch whose steps had "
                f"{self._resumed['samples_per_step']} samples on all ranks together, here they have "
                f"{self._samples_per_step}: set batch_size so that they are as many, or resume from a checkpoint of an "
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
    last = batches.pop() if batches and len(batches[-1]) < batch_size else None  # a short batch stays the last one
    shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return torch.cat([*shuffled, *([] if last is None else [last])]) if shuffled or last is not None else order


def _mix(seed: int, epoch: int, stream: int | str) -> int:
    """63 bits from three values; unlike a sum, (seed 0, epoch 1) and (seed 1, epoch 0) share nothing."""
    digest = blake2b(f"{seed} {epoch} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
