"""Parameters in shards (FSDP, tensor parallel): the part that this rank holds, and sums over the parts of all ranks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes longer than pruning does
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# How FSDP1 shares out: its shards are plain tensors of one dimension, and nothing tells replicas from shards.
FSDP1_LAYOUT = "fsdp1"


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is one part of a whole that several ranks share (a ``DTensor``)."""
    return hasattr(x, "placements")


def is_fsdp1_shard(p: Tensor) -> bool:
    """Whether a parameter is one of FSDP1's, a part that nothing else marks."""
    return bool(getattr(p, "_fsdp_flattened", False))


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; a plain tensor is its own part."""
    return x.to_local() if is_dtensor(x) else x


def full_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all entries, each once, as a plain tensor; a collective where the tensor is in shards."""
    total = x.sum(dtype=dtype)
    return total.full_tensor() if is_dtensor(total) else total


def shard_layout(p: Tensor) -> Hashable:
    """How a parameter is shared out: parameters of equal values can be summed up by one reduction. None if whole.

    Raises:
        ValueError: parts that are yet to be added up.
    """
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"a parameter has the placements {p.placements}: expected shards or replicas")
        dims = tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())
        return (p.device_mesh, dims) if dims else None
    return FSDP1_LAYOUT if is_fsdp1_shard(p) else None


def reduce_shards(parts: Sequence[Tensor], shared: Sequence[Hashable]) -> list[Tensor]:
    """Add vectors up over the ranks that share the parameters they are of: one reduction for each way of sharing.

    All ranks that share must call, with the same parameters; those of FSDP1, which have a gradient on some ranks alone,
    are left as they are. Over a mesh of several dimensions it takes one reduction a sharded dimension.

    Args:
        parts: vectors, each of this rank's parts; those of whole parameters are left as they are.
        shared: how the parameters of each vector are shared out, as :func:`sharing` says.
    """
    summed = list(parts)
    for key in dict.fromkeys(key for key in shared if key not in (None, FSDP1_LAYOUT)):
        places = [i for i, other in enumerate(shared) if other == key]
        together = torch.cat([summed[i] for i in places])
        mesh, dims = cast("tuple[DeviceMesh, tuple[int, ...]]", key)
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


def has_unsupported_placements(x: Tensor) -> bool:
    """Whether a tensor is in shards of a kind whose entries cannot be addressed: strided ones, of FSDP over tensor
    parallel, or sums yet to be made."""
    if not is_dtensor(x):
        return False
    from torch.distributed.tensor import Replicate, Shard

    return any(type(placement) not in (Shard, Replicate) for placement in x.placements)


def full_tensor(x: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective where it is in shards."""
    return x.full_tensor() if is_dtensor(x) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor shared out as another is; nothing is sent, as every rank takes its part of its own copy."""
    if not is_dtensor(like) or is_dtensor(x):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_from_shards(x: DTensor, indices: Tensor) -> Tensor:
    """The entries at flat positions of the whole tensor, (kept,), on every rank; a collective of that many entries."""
    local = x.to_local().detach()
    here, at = _local_indices(x, indices)
    values = torch.zeros(len(indices), dtype=local.dtype, device=local.device)
    values[here] = local.reshape(-1)[at]
    bits = values.view(torch.uint8)  # of all ranks one has more than zeros; a sum of numbers would lose the sign of 0
    for dim in _sharded_dims(x):
        dist.all_reduce(bits, group=x.device_mesh.get_group(dim))
    return values


def scatter_to_shards(x: DTensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite this rank's part of the entries at distinct flat positions."""
    local = x.to_local().detach()
    here, at = _local_indices(x, indices)
    local.view(-1).index_copy_(0, at, values.to(local.device)[here])


def equal_shards(a: DTensor, b: DTensor) -> bool:
    """Whether two tensors that are shared out alike are equal, on all ranks; a collective."""
    same = torch.tensor(torch.equal(a.to_local(), b.to_local()), device=a.to_local().device, dtype=torch.int32)
    for dim in range(a.device_mesh.ndim):
        dist.all_reduce(same, dist.ReduceOp.MIN, group=a.device_mesh.get_group(dim))
    return bool(same)


def _sharded_dims(x: DTensor) -> list[int]:
    return [dim for dim, placement in enumerate(x.placements) if placement.is_shard()]


def _local_indices(x: DTensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the positions this rank holds, and where in its part."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    flat = indices.to(x.to_local().device, torch.int64)
    here, at = torch.ones_like(flat, dtype=torch.bool), torch.zeros_like(flat)
    stride = x.numel()
    for size, part, first in zip(x.shape, shape, offset, strict=True):
        stride //= max(size, 1)
        place = flat // max(stride, 1) % max(size, 1) - first
        here &= (place >= 0) & (place < part)
        at = at * part + place
    return here, at[here]


def reshard(module: nn.Module) -> None:
    """Bring FSDP2's parameters back into shards.

    After a forward without a backward, as in validation, those of the root are whole and not the optimizer's.
    """
    from torch.distributed.fsdp import FSDPModule  # takes a while

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
