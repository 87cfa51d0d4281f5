"""Parameters in shards (FSDP, tensor parallel): the part that this rank holds, and sums over the parts of all ranks."""

from collections.abc import Hashable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

FLAT = "flat"  # how FSDP1 shares out: parts are plain tensors of one dimension, and nothing tells replicas from shards


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; a plain tensor is its own part."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all entries, each once, as a plain tensor; a collective where the tensor is in shards."""
    total = x.sum(dtype=dtype)
    return total.full_tensor() if isinstance(total, DTensor) else total


def sharing(p: Tensor) -> Hashable:
    """How a parameter is shared out: parameters of equal values can be summed up by one reduction. None if whole.

    Raises:
        ValueError: parts that are yet to be added up.
    """
    if isinstance(p, DTensor):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"a parameter has the placements {p.placements}: expected shards or replicas")
        dims = tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())
        return (p.device_mesh, dims) if dims else None
    return FLAT if getattr(p, "_fsdp_flattened", False) else None


def reduce_shards(parts: Sequence[Tensor], shared: Sequence[Hashable]) -> list[Tensor]:
    """Add vectors up over the ranks that share the parameters they are of: one reduction for each way of sharing.

    All ranks that share must call, with the same parameters; those of FSDP1, which have a gradient on some ranks alone,
    are left as they are. Over a mesh of several dimensions it takes one reduction a sharded dimension.

    Args:
        parts: vectors, each of this rank's parts; those of whole parameters are left as they are.
        shared: how the parameters of each vector are shared out, as :func:`sharing` says.
    """
    summed = list(parts)
    for key in dict.fromkeys(key for key in shared if key not in (None, FLAT)):
        places = [i for i, other in enumerate(shared) if other == key]
        together = torch.cat([summed[i] for i in places])
        mesh, dims = cast(tuple[DeviceMesh, tuple[int, ...]], key)
        for dim in dims:
            dist.all_reduce(together, group=mesh.get_group(dim))
        for i, part in zip(places, together.split([len(summed[i]) for i in places]), strict=True):
            summed[i] = part
    return summed


def sum_over_ranks(pairs: Sequence[tuple[Tensor, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts added up over all ranks, as scalars; replicas count in both alike.

    Args:
        pairs: this rank's; it may have none.
        like: a tensor on the device of the sums.
    """
    values = [torch.stack([total, total.new_tensor(count)]) for total, count in pairs]
    both = torch.stack([torch.zeros(2, device=like.device), *values]).sum(0)
    dist.all_reduce(both)
    return both[0], both[1]
