"""Base class of the tasks' LightningDataModules: the loaders of splits that a subclass fills."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from dpp_lightning.tasks.common.reproducible import EpochDataLoader, EpochSampler, EvaluationSampler, resolve_seed


class TaskDataModule(LightningDataModule, ABC):
    """Loaders of ``train`` (shuffled), ``val`` and ``test`` (dealt out to the ranks) and ``calibration`` (in order).

    Which samples a split holds is the subclass's: it fills ``splits`` in ``setup``. Samples of a split that is scored
    give a label to ignore where their index is negative, see :class:`EvaluationSampler`.

    Args:
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        fractions: ``val``, ``calibration`` and other splits to their fractions of the data, each at least 0, together
            below 1.
        split_seed: seed of the cut into splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.
        length_grouped: training batches of samples of similar length; needs :meth:`lengths`.
        num_workers: loader processes.

    Attributes:
        splits: name to samples, after ``setup``.
        collate: makes a batch of samples, after ``setup``; ``None`` for torch's ``default_collate``.

    Raises:
        ValueError: fractions outside their range, or a batch size below 1.
    """

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        fractions: Mapping[str, float],
        split_seed: int,
        seed: int | None,
        length_grouped: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if min(batch_size, eval_batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}, eval_batch_size {eval_batch_size}, expected at least 1")
        if not (all(0 <= fraction < 1 for fraction in fractions.values()) and sum(fractions.values()) < 1):
            given = ", ".join(f"{split}_fraction {fraction}" for split, fraction in fractions.items())
            raise ValueError(f"{given}: expected fractions of at least 0, together below 1, such as 0.1 and 0.05")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.fractions, self.split_seed, self.seed = dict(fractions), split_seed, seed
        self.length_grouped = length_grouped
        self.splits: dict[str, Any] = {}
        self.collate: Callable[[Any], Any] | None = None

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Fill ``splits``; a split that is there is left as it is."""

    def samples(self, split: str, order: Sequence[int] | None = None) -> Any:
        """The samples of a split as a loader reads them.

        Args:
            split: a key of ``splits``.
            order: the samples in this order; only a data module with :meth:`lengths` is asked for one.
        """
        return self.splits[split]

    def lengths(self, split: str) -> list[int] | None:
        """Tokens of each sample of a split; ``None`` where samples have no lengths, as images."""
        return None

    def test_splits(self) -> Sequence[str]:
        """The splits that ``test`` and ``predict`` read, one loader each."""
        return ("test",)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split; the order depends on (seed, epoch) alone."""
        samples = self.samples("train")
        replicas, rank = _replica(self.trainer)
        sampler = EpochSampler(
            len(samples),
            resolve_seed(self.seed),
            lengths=self.lengths("train") if self.length_grouped else None,
            batch_size=self.batch_size,
            num_replicas=replicas,
            rank=rank,
        )
        return EpochDataLoader(
            samples,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
            # workers know the epoch in which they were started: samples that depend on it need new ones
            persistent_workers=self.num_workers > 0 and not hasattr(samples, "set_epoch"),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation split; no loader where it is empty."""
        return self._evaluation_loaders(["val"], shared=True)

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test split, or a loader for each where there are several; no loader where there is none."""
        return self._evaluation_loaders(self.test_splits(), shared=True)

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test split in its own order; across ranks Lightning deals it out without repetition."""
        return self._evaluation_loaders(self.test_splits(), shared=False)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Labelled batches that are neither trained on nor scored, in a fixed order, the same on every rank.

        Raises:
            ValueError: no sample is held out for calibration.
        """
        if "calibration" not in self.splits:
            self.setup()
        loader = self._evaluation_loaders(["calibration"], shared=False)
        if isinstance(loader, list):
            raise ValueError(
                f"calibration_fraction {self.fractions['calibration']} holds out no sample; raise it, e.g. to 0.05"
            )
        return loader

    def _evaluation_loaders(self, splits: Sequence[str], shared: bool) -> DataLoader[Any] | list[DataLoader[Any]]:
        """A loader for each split that holds samples; one that is alone comes without a list."""
        loaders = [self._evaluation_loader(split, shared) for split in splits if len(self.splits.get(split, ()))]
        return loaders[0] if len(loaders) == 1 else loaders

    def _evaluation_loader(self, split: str, shared: bool) -> DataLoader[Any]:
        """Batches of a split in its order. ``shared`` deals them out to the ranks, and sorts them by length: half of
        the tokens would be padding otherwise."""
        order, sampler = None, None
        if shared:
            lengths = self.lengths(split)
            order = None if lengths is None else sorted(range(len(lengths)), key=lengths.__getitem__)
            replicas, rank = _replica(self.trainer)
            if replicas > 1:
                sampler = EvaluationSampler(len(self.splits[split]), num_replicas=replicas, rank=rank)
        return DataLoader(
            self.samples(split, order),
            batch_size=self.eval_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )


def module_attribute(trainer: Trainer | None, name: str) -> Any:
    """An attribute of the module that a data module is used with; ``None`` without a trainer or the attribute."""
    return None if trainer is None else getattr(trainer.lightning_module, name, None)


def _replica(trainer: Trainer | None) -> tuple[int, int]:
    """The number of ranks that the data is dealt out to, and which of them this is."""
    settings = None if trainer is None else trainer.distributed_sampler_kwargs
    return (settings["num_replicas"], settings["rank"]) if settings else (1, 0)
