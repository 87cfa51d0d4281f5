"""Images of a data set with the indices of their classes, decoded in advance where they are small, else on access."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL, item_seed

IN_MEMORY = 2**28  # bytes of decoded images that one split may hold in memory


class ImageRows(Dataset[tuple[Tensor, Tensor]]):
    """One split; a sample is (image, label), and a negative index, EvaluationSampler's filler, gives its image with a
    label to ignore.

    Images of one size are decoded in advance where they take no more than 256 MiB, others on each access. Of a small
    split all images are checked here, of a larger one the first.

    Args:
        rows: the data set that the images are taken from.
        column: its column of images.
        mode: ``RGB`` or ``L`` (grey), to which images are converted.
        positions: which rows of the data set are taken, (n,).
        labels: indices in the list of classes, integers (n,).
        transform: from a uint8 image (channels, height, width) to the sample's image.
        seed: to be given where the transform is random. Its random numbers are then a function of seed, epoch and row,
            whatever the number of workers and ranks and the batch size.

    Raises:
        ValueError: an image that cannot be read, with its row.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        mode: Literal["RGB", "L"],
        positions: Tensor,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor],
        seed: int | None = None,
    ) -> None:
        self.positions, self.labels, self.transform = positions, labels, transform
        self.seed, self.epoch = seed, 0
        self._column, self._decoder = column, datasets.Image(mode=mode)
        encoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._rows = encoded.select(positions.tolist())
        self._decoded = self._decode_all() if len(self) else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of the transform; ``EpochDataLoader`` calls it at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} images")
        i = index % len(self)
        image = self._decode(i, self._rows[i]) if self._decoded is None else self._decoded[i]
        label = self.labels[i] if index >= 0 else torch.full_like(self.labels[i], IGNORED_LABEL)
        if self.seed is None:
            return self.transform(image), label
        with item_seed(self.seed, self.epoch, int(self.positions[i])):
            return self.transform(image), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[i] for i in indices]

    def _decode_all(self) -> Tensor | None:
        """All images, uint8 (n, channels, height, width); ``None`` where they are too large or of several sizes."""
        first = self._decode(0, self._rows[0])
        if len(self) * first.numel() > IN_MEMORY:
            return None
        decoded, same_size = torch.empty((len(self), *first.shape), dtype=torch.uint8), True
        for i, row in enumerate(self._rows):
            image = self._decode(i, row)
            same_size = same_size and image.shape == first.shape
            if same_size:
                decoded[i] = image
        return decoded if same_size else None

    def _decode(self, index: int, row: dict[str, Any]) -> Tensor:
        """The image of a row, uint8 (channels, height, width).

        Raises:
            ValueError: it cannot be read.
        """
        try:
            return functional.pil_to_tensor(self._decoder.decode_example(row[self._column]))
        except Exception as error:  # a damaged file raises almost any type
            raise ValueError(
                f"row {int(self.positions[index])}, column {self._column!r}: no image that can be read "
                f"({type(error).__name__}: {error}); repair it or leave it out of the data"
            ) from error
