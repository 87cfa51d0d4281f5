"""Kept entries of many tensors: taken, overwritten and hashed. The work is per kept entry, never per entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from dpp_lightning.tensors.fingerprint import raw_bytes
from dpp_lightning.tensors.shards import gather_from_shards, is_dtensor, scatter_to_shards


def gather_entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat positions (int32 or int64, any device), as a copy of shape (kept,).

    Of a tensor in shards all ranks get all of them; a collective.
    """
    if is_dtensor(tensor):
        return gather_from_shards(tensor, indices)
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, indices.to(tensor.device))
    return tensor[torch.unravel_index(indices.to(tensor.device, torch.int64), tensor.shape)]


def scatter_entries(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite the entries at distinct flat positions; of a tensor in shards those that this rank holds."""
    if is_dtensor(tensor):
        scatter_to_shards(tensor, indices, values)
        return
    tensor, flat = tensor.detach(), indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, flat, values)
    else:
        tensor[torch.unravel_index(flat, tensor.shape)] = values


class EntriesHash:
    """xxh3-128 over values at kept positions, as float32 in the order of the delta's tensors.

    In float32, so that a base in bfloat16 is the same base when it is loaded in float32.

    Attributes:
        first: the hash after the first tensor that has kept entries, by which a wrong base is known early.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self.first = ""

    def update(self, values: Tensor) -> None:
        """The next tensor's values, shape (kept,), any float dtype."""
        self._digest.update(raw_bytes(values.float()))
        if not self.first and values.numel():
            self.first = self._digest.hexdigest()

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.hexdigest()


def add_rescaled(base: Tensor, values: Tensor, q: float) -> Tensor:
    """theta_0 + value / q in float32 (float64 for a float64 base), cast to the base's dtype; shapes (kept,)."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return (base.to(wide) + values.to(base.device, wide) / q).to(base.dtype)


def group_by_device_and_dtype(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in groups of one device and dtype, so that arithmetic on many small tensors can be done at once."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    yield from groups.values()
