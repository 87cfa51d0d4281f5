"""Kept entries of tensors: gathered, overwritten and hashed. The work is per kept entry, never per entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch
import xxhash
from torch import Tensor

from dpp_lightning.tensors.fingerprint import raw_bytes
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.shards import gather_from_shards, is_dtensor, scatter_to_shards

_SAMPLES = 1024


def gather_entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """A copy of the entries at flat positions, shape (kept,), on the tensor's device.

    Of a tensor in shards every rank gets all of them; a collective.

    Args:
        tensor: any shape, dtype and device.
        indices: flat positions in C order, int32 or int64, shape (kept,), on any device.
    """
    if is_dtensor(tensor):
        return gather_from_shards(tensor, indices)
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, indices.to(tensor.device))
    return tensor[torch.unravel_index(indices.to(tensor.device, torch.int64), tensor.shape)]


def scatter_entries(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite the entries at flat positions, in place; of a tensor in shards those that this rank holds.

    Args:
        tensor: any shape, dtype and device.
        indices: distinct flat positions in C order, int32 or int64, shape (kept,), on any device.
        values: of the tensor's dtype, shape (kept,).
    """
    if is_dtensor(tensor):
        scatter_to_shards(tensor, indices, values)
        return
    tensor, flat = tensor.detach(), indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, flat, values)
    else:
        tensor[torch.unravel_index(flat, tensor.shape)] = values


class EntriesHash:
    """xxh3-128 over a base's values at the kept positions, tensor by tensor in the delta's order.

    The values are hashed as float32, so that a base in bfloat16 has the same hash when it is loaded in float32.

    Attributes:
        first: the hash after the first tensor that has kept entries, by which a wrong base is recognised early; empty
            before that tensor, and where no tensor has any.
    """

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self.first = ""

    def update(self, values: Tensor) -> None:
        """Add the next tensor's values, shape (kept,), any float dtype."""
        self._digest.update(raw_bytes(values.float()))
        if not self.first and values.numel():
            self.first = self._digest.hexdigest()

    def hexdigest(self, samples: Iterable[Tensor]) -> str:
        """32 hexadecimal digits.

        Args:
            samples: what is hashed where there are no kept positions, and read only then: :func:`samples_of`.
        """
        digest = self._digest.copy()
        for values in () if self.first else samples:
            digest.update(raw_bytes(values.float()))
        return digest.hexdigest()


def samples_of(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...] | None]) -> Iterator[Tensor]:
    """At most 1,024 entries of each weight, evenly spaced: by what a base is known of which no entry changes.

    The delta of linear probing is a head alone, and is still of one base.

    Args:
        tensors: name to tensor, of any dtype.
        shapes: the names that :func:`is_sampled` chooses from, and the shapes of the first rows that count; None: all.
    """
    for name in sorted(filter(is_sampled, shapes)):
        tensor, shape = tensors[name], shapes[name]
        if tensor.is_floating_point() and tensor.dim() > 1:
            numel = tensor.numel() if shape is None else prod(shape)
            yield gather_entries(tensor, torch.arange(0, numel, max(1, -(-numel // _SAMPLES))))


def is_sampled(name: str) -> bool:
    """Whether a tensor is a weight by its name: buffers, which files and modules need not share, are none."""
    return name.rpartition(".")[2] == "weight"


def add_rescaled(base: Tensor, values: Tensor, q: float) -> Tensor:
    """θ0 + value / q, the rescaled delta added to the base, computed in float32, or float64 where one of them is that.

    Args:
        base: θ0 at the kept positions, shape (kept,), any float dtype.
        values: the delta at the kept positions, shape (kept,).
        q: the rescaling factor that the delta is divided by.

    Returns:
        The sums, shape (kept,), cast to the base's dtype.
    """
    wide = torch.float64 if torch.float64 in (base.dtype, values.dtype) else torch.float32
    device = torch.device("cpu") if wide == torch.float64 and base.device.type == "mps" else base.device
    sums = (values.to(device, wide) / q).add_(base.to(device, wide))  # the mps device has no float64
    return sums.to(base.dtype).to(base.device)


def check_finite(sums: Mapping[str, Tensor], q: float) -> None:
    """Refuse sums of :func:`add_rescaled` that overflow the base's dtype.

    Args:
        sums: by the tensor's name, shapes (kept,).
        q: what the deltas were divided by, for the message.

    Raises:
        ValueError: one is not finite.
    """
    for name, values in sums.items():
        if not is_finite(values):
            raise ValueError(
                f"{name}: theta_0 + value / q is not finite in {values.dtype} at q={q:g}; "
                "use a wider dtype or a larger q"
            )


def group_by_device_and_dtype(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in groups of one device and dtype, whose tensors can be concatenated for arithmetic on all of them."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    yield from groups.values()
