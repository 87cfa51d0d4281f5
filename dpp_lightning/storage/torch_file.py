"""PyTorch files larger than memory: what is in them without the data, and the data as views of mapped pages."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode


def outline(file: Path | BinaryIO) -> object:
    """What a file of ``torch.save`` holds, with tensors that only know their place in it: no weights are read.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and plain values.
        RuntimeError: it is damaged.
    """
    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


def filled(state: Mapping[str, object], pages: mmap.mmap, start: int = 0) -> dict[str, object]:
    """A state dict of :func:`outline` with the tensors of the mapped file in place; ties stay.

    Args:
        state: name to tensor without data (or to anything else, which is kept).
        pages: the mapped file.
        start: where in it the zip begins.

    Raises:
        ValueError: this torch does not tell the places, or one lies outside the file.
    """
    storages: dict[int, UntypedStorage] = {}

    def fill(fake: Tensor) -> Tensor:
        place = fake.untyped_storage()
        if not place.nbytes():
            return torch.empty(fake.shape, dtype=fake.dtype)
        if place._cdata not in storages:
            offset = place._checkpoint_offset
            if offset is None:
                raise ValueError(f"torch {torch.__version__} does not tell where its tensors lie in the file")
            data = torch.frombuffer(pages, dtype=torch.uint8, count=place.nbytes(), offset=start + offset)
            storages[place._cdata] = data.untyped_storage()
        empty = torch.empty(0, dtype=fake.dtype)
        return empty.set_(storages[place._cdata], fake.storage_offset(), fake.shape, fake.stride())  # type: ignore[call-overload]

    return {name: fill(part) if isinstance(part, Tensor) else part for name, part in state.items()}
