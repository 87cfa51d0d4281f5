"""Images of a data set with their places in a list of classes: decoded once where they are small, else when asked."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL, item_seed

IN_MEMORY = 2**28  # bytes of decoded images that one part of the data may hold in memory


class ImageRows(Dataset[tuple[Tensor, Tensor]]):
    """One part of a data set; a sample is (image, label). A negative index is a filler of EvaluationSampler: its image,
    with a label to ignore.

    Images of one size are decoded here, once, where they take no more than 256 MiB; others each time they are asked
    for. A small part is checked whole, of a larger one the first image.

    Args:
        rows: the data set, of which the rows ``positions`` are taken.
        column: its column of images.
        mode: ``RGB`` or ``L`` (grey), to which images are converted.
        positions: rows of ``rows``, (n,).
        labels: places in the list of classes, integers (n,).
        transform: from a uint8 image (channels, height, width) to the sample's.
        seed: given, the transform is random, and its random numbers are a function of seed, epoch and row: the same
            whatever the number of workers and ranks and the size of a batch.

    Raises:
        ValueError: an image that cannot be read; says in which row.
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
        """Choose the random numbers of the transform; called by ``EpochDataLoader``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} of {len(self)} images")
        place = index % len(self)
        image = self._decode(place, self._rows[place]) if self._decoded is None else self._decoded[place]
        label = self.labels[place] if index >= 0 else torch.full_like(self.labels[place], IGNORED_LABEL)
        if self.seed is None:
            return self.transform(image), label
        with item_seed(self.seed, self.epoch, int(self.positions[place])):
            return self.transform(image), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return [self[i] for i in indices]

    def _decode_all(self) -> Tensor | None:
        """All images, (n, channels, height, width) of uint8; None where they are too many or of several sizes."""
        first = self._decode(0, self._rows[0])
        if len(self) * first.numel() > IN_MEMORY:
            return None
        decoded, alike = torch.empty((len(self), *first.shape), dtype=torch.uint8), True
        for place, row in enumerate(self._rows):
            image = self._decode(place, row)
            alike = alike and image.shape == first.shape
            if alike:
                decoded[place] = image
        return decoded if alike else None

    def _decode(self, place: int, row: dict[str, Any]) -> Tensor:
        try:
            return functional.pil_to_tensor(self._decoder.decode_example(row[self._column]))
        except Exception as error:  # a damaged file ends in almost any type
            raise ValueError(
                f"row {int(self.positions[place])}, column {self._column!r}: no image that can be read "
                f"({type(error).__name__}: {error}); repair it or leave it out of the data"
            ) from error
