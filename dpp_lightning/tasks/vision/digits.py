"""Scikit-learn's bundled handwritten digits, 1,797 images of 8 x 8 pixels: the quickstart's data, no download."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL, EpochDataLoader, EpochSampler, resolve_seed
from dpp_lightning.tasks.common.splits import evaluation_sampler, of_module, replica

Positions = npt.NDArray[np.int64]

_MEAN, _STD = 0.3055, 0.3761  # of all pixels, scaled to [0, 1]


class DigitsDataModule(LightningDataModule):
    """Handwritten digits in four disjoint parts: train, val, calibration and test, each with its share of every digit.

    A sample is (image, label): a normalised float image (1, 8, 8), and the place of its digit in ``classes``. The part
    that an image belongs to depends on ``split_seed``, its digit and the fractions, not on the other ``classes``.

    Args:
        classes: the digits to keep, each in 0..9, at least two; by default all ten.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        val_fraction: share of each digit's images, in [0, 1), that is scored in validation.
        calibration_fraction: share, in [0, 1), of :meth:`calibration_dataloader`.
        test_fraction: share, in [0, 1), that is scored by ``test``.
        split_seed: seed of the cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.

    Attributes:
        splits: after ``setup``, the parts ``train``, ``val``, ``calibration`` and ``test``.

    Raises:
        ValueError: classes that are no digits, repeated, or fewer than two; fractions outside [0, 1) or that leave
            nothing to train on; in ``setup``, a module with fewer outputs than classes.
    """

    def __init__(
        self,
        classes: list[int] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        val_fraction: float = 0.2,
        calibration_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.classes = list(range(10)) if classes is None else list(classes)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes) or set(self.classes) - set(range(10)):
            raise ValueError(f"classes is {classes}, expected at least two different digits from 0 to 9")
        if min(batch_size, eval_batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size}, eval_batch_size {eval_batch_size}, expected at least 1")
        self.fractions = {"val": val_fraction, "calibration": calibration_fraction, "test": test_fraction}
        if not (all(0 <= f < 1 for f in self.fractions.values()) and sum(self.fractions.values()) < 1):
            raise ValueError(
                f"val_fraction {val_fraction}, calibration_fraction {calibration_fraction} and test_fraction "
                f"{test_fraction} are shares of the data: each at least 0, together below 1, such as 0.2, 0.1 and 0.1"
            )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.split_seed, self.seed = split_seed, seed
        self.splits: dict[str, DigitsSplit] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the images and cut them into the four parts, each in the order of the file."""
        outputs = of_module(self.trainer, "num_classes")
        if outputs is not None and outputs < len(self.classes):
            raise ValueError(f"the model has num_classes {outputs} for the {len(self.classes)} classes {self.classes}")
        if self.splits:
            return
        digits, labels = load_digits(return_X_y=True)
        images = (torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 16 - _MEAN) / _STD
        parts: dict[str, list[Positions]] = {part: [] for part in ("train", *self.fractions)}
        for digit in self.classes:
            for part, positions in self._cut(digit, np.flatnonzero(labels == digit)).items():
                parts[part].append(positions)
        place = torch.zeros(10, dtype=torch.long)
        place[self.classes] = torch.arange(len(self.classes))
        for part, of_digits in parts.items():
            chosen = torch.from_numpy(np.sort(np.concatenate(of_digits)))
            self.splits[part] = DigitsSplit(images[chosen], place[torch.from_numpy(labels)[chosen]], chosen)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training part; the order depends on (seed, epoch) alone."""
        size = len(self.splits["train"])
        sampler = EpochSampler(size, resolve_seed(self.seed), **replica(self.trainer))
        return EpochDataLoader(self.splits["train"], batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation part; no loader where ``val_fraction`` is 0."""
        return self._evaluation_loader("val", shared=True) if len(self.splits["val"]) else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The test part; no loader where ``test_fraction`` is 0."""
        return self._evaluation_loader("test", shared=True) if len(self.splits["test"]) else []

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test part; across ranks Lightning deals it out without repetition."""
        return self._evaluation_loader("test")

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Labelled batches that are neither trained on nor scored, in a fixed order, the same on every rank."""
        if not self.splits:
            self.setup()
        if not len(self.splits["calibration"]):
            raise ValueError(
                f"calibration_fraction {self.fractions['calibration']} holds out no image; raise it to 0.1"
            )
        return self._evaluation_loader("calibration")

    def describe_prediction(self, index: int, prediction: Any, dataloader_idx: int = 0) -> dict[str, Any]:
        """The true and the predicted digit of one image of :meth:`predict_dataloader`.

        Args:
            index: place of the image, from 0.
            prediction: the predicted place in ``classes``, a number or a tensor of one.
            dataloader_idx: 0, as there is one loader.
        """
        predicted = int(prediction)
        unnamed = f"output {predicted}"  # of a model with more outputs than there are classes
        named = self.classes[predicted] if predicted < len(self.classes) else unnamed
        return {"label": self.classes[int(self.splits["test"].labels[index])], "prediction": named}

    def _cut(self, digit: int, positions: Positions) -> dict[str, Positions]:
        """One digit's positions in the file, shuffled and dealt out to the parts."""
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(10 * self.split_seed + digit))
        sizes = [round(fraction * len(positions)) for fraction in self.fractions.values()]
        if sum(sizes) >= len(positions):
            raise ValueError(f"the fractions {self.fractions} leave no image of digit {digit} to train on; lower them")
        *held_out, rest = np.split(positions[order.numpy()], np.cumsum(sizes))
        return {"train": rest, **dict(zip(self.fractions, held_out, strict=True))}

    def _evaluation_loader(self, split: str, shared: bool = False) -> DataLoader[Any]:
        """Batches in the split's order; ``shared`` deals them out to the ranks."""
        data = self.splits[split]
        sampler = evaluation_sampler(self.trainer, len(data)) if shared else None
        return DataLoader(data, batch_size=self.eval_batch_size, sampler=sampler)


class DigitsSplit(Dataset[tuple[Tensor, Tensor]]):
    """One part. A negative index is a filler of EvaluationSampler: its image, with a label to ignore.

    Attributes:
        images: normalised floats (n, 1, 8, 8).
        labels: places in ``classes``, integers (n,).
        positions: of the images in the bundled file, (n,), rising.
    """

    def __init__(self, images: Tensor, labels: Tensor, positions: Tensor) -> None:
        self.images, self.labels, self.positions = images, labels, positions

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = self.labels[index % len(self)]
        return self.images[index % len(self)], label if index >= 0 else torch.full_like(label, IGNORED_LABEL)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[i] for i in indices]
