"""Scikit-learn's bundled handwritten digits, 1,797 images of 8 x 8 pixels: the quickstart's data, no download."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

from dpp_lightning.tasks.common.data import TaskDataModule, module_attribute
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL
from dpp_lightning.tasks.vision.image_columns import named_prediction

Rows = npt.NDArray[np.int64]  # of the bundled file

_MEAN, _STD = 0.3055, 0.3761  # of all pixels, scaled to [0, 1]


class DigitsDataModule(TaskDataModule):
    """Handwritten digits in four splits, train, val, calibration and test, each with its fraction of every digit.

    A sample is (image, label): a normalised float image (1, 8, 8), and the index of its digit in ``classes``. The split
    that an image belongs to depends on ``split_seed``, its digit and the fractions, not on the other ``classes``.

    Args:
        classes: the digits to keep, each in 0..9, at least two; by default all ten.
        batch_size: samples of a training batch on each rank.
        eval_batch_size: samples of every other batch.
        val_fraction: fraction of each digit's images, in [0, 1), that is scored in validation.
        calibration_fraction: fraction, in [0, 1), for :meth:`calibration_dataloader`.
        test_fraction: fraction, in [0, 1), that is scored by ``test``.
        split_seed: seed of the cut, apart from ``seed``, so that runs with several seeds share their splits.
        seed: seed of the order of training data; by default the one of ``seed_everything``, else 0.

    Attributes:
        splits: after ``setup``, ``train``, ``val``, ``calibration`` and ``test``.

    Raises:
        ValueError: classes that are no digits, repeated, or fewer than two; fractions outside [0, 1) or not below 1
            together; in ``setup``: nothing left to train on, a module with fewer outputs than classes.
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
        fractions = {"val": val_fraction, "calibration": calibration_fraction, "test": test_fraction}
        super().__init__(batch_size, eval_batch_size, fractions, split_seed, seed)
        self.classes = list(range(10)) if classes is None else list(classes)
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes) or set(self.classes) - set(range(10)):
            raise ValueError(f"classes is {classes}, expected at least two different digits from 0 to 9")

    def setup(self, stage: str | None = None) -> None:
        """Read the images and cut them into the four splits, each in the order of the file."""
        outputs = module_attribute(self.trainer, "num_classes")
        if outputs is not None and outputs < len(self.classes):
            raise ValueError(f"the model has num_classes {outputs} for the {len(self.classes)} classes {self.classes}")
        if self.splits:
            return
        digits, labels = load_digits(return_X_y=True)
        images = (torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 16 - _MEAN) / _STD
        rows_by_digit: dict[str, list[Rows]] = {split: [] for split in ("train", *self.fractions)}
        for digit in self.classes:
            for split, rows in self._cut(digit, np.flatnonzero(labels == digit)).items():
                rows_by_digit[split].append(rows)
        class_index = torch.zeros(10, dtype=torch.long)
        class_index[self.classes] = torch.arange(len(self.classes))
        for split, pieces in rows_by_digit.items():
            positions = torch.from_numpy(np.sort(np.concatenate(pieces)))
            split_labels = class_index[torch.from_numpy(labels)[positions]]
            self.splits[split] = DigitsSplit(images[positions], split_labels, positions)

    def describe_prediction(self, index: int, prediction: Any, dataloader_idx: int = 0) -> dict[str, Any]:
        """The true and the predicted digit of one image of :meth:`predict_dataloader`.

        Args:
            index: position of the image in the test split, from 0.
            prediction: the predicted index in ``classes``, a number or a tensor of one.
            dataloader_idx: 0, as there is one loader.
        """
        return named_prediction(self.classes, self.splits["test"].labels[index], prediction)

    def _cut(self, digit: int, rows: Rows) -> dict[str, Rows]:
        """One digit's rows of the file, shuffled and dealt out to the splits.

        Raises:
            ValueError: no row is left to train on.
        """
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(10 * self.split_seed + digit))
        sizes = [round(fraction * len(rows)) for fraction in self.fractions.values()]
        if sum(sizes) >= len(rows):
            raise ValueError(f"the fractions {self.fractions} leave no image of digit {digit} to train on; lower them")
        *held_out, rest = np.split(rows[order.numpy()], np.cumsum(sizes))
        return {"train": rest, **dict(zip(self.fractions, held_out, strict=True))}


class DigitsSplit(Dataset[tuple[Tensor, Tensor]]):
    """One split; a negative index, EvaluationSampler's filler, gives its image with a label to ignore.

    Attributes:
        images: normalised floats (n, 1, 8, 8).
        labels: indices in ``classes``, integers (n,).
        positions: rows of the images in the bundled file, (n,), rising.
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
