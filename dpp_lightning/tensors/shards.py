"""Tensors in shards (FSDP, tensor parallel): what this rank holds, and sums and entries of the whole.

A function that is called a collective must be called on every rank that shares the tensor, in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes longer than pruning does
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# The layout of FSDP1, whose shards are plain tensors of one dimension: nothing tells a replica from a shard.
FSDP1_LAYOUT = "fsdp1"


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is in shards or replicas on several ranks, as torch's ``DTensor``; those of FSDP1 are not."""
    return hasattr(x, "placements")


def is_fsdp1_shard(p: Tensor) -> bool:
    """Whether a parameter is this rank's shard under FSDP1, a plain tensor that only FSDP1's own mark tells."""
    return bool(getattr(p, "_fsdp_flattened", False))


def has_unsupported_placements(x: Tensor) -> bool:
    """Whether a tensor is in shards whose entries cannot be addressed one by one.

    Such are the strided shards of FSDP over tensor parallel, and partial sums that are yet to be reduced.
    """
    if not is_dtensor(x):
        return False
    from torch.distributed.tensor import Replicate, Shard

    return any(type(placement) not in (Shard, Replicate) for placement in x.placements)


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; a plain tensor as it is."""
    return x.to_local() if is_dtensor(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """The whole tensor on every rank; a collective where it is in shards."""
    return x.full_tensor() if is_dtensor(x) else x


def full_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over all entries of the whole, each counted once, as a scalar; a collective where it is in shards."""
    total = x.sum(dtype=dtype)
    return total.full_tensor() if is_dtensor(total) else total


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank holds whole, laid out in shards as ``like`` is; nothing is sent between ranks."""
    if not is_dtensor(like) or is_dtensor(x):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_layout(p: Tensor) -> Hashable:
    """How a parameter is laid out over ranks; sums over parameters of one layout can be reduced together.

    Returns:
        (device mesh, sharded dimensions of the mesh); ``FSDP1_LAYOUT`` for a shard of FSDP1; None where this rank holds
        the whole parameter.

    Raises:
        ValueError: a placement is a partial sum that is yet to be reduced.
    """
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"a parameter has the placements {p.placements}: expected shards or replicas")
        dims = tuple(dim for dim, placement in enumerate(p.placements) if not placement.is_replicate())
        return (p.device_mesh, dims) if dims else None
    return FSDP1_LAYOUT if is_fsdp1_shard(p) else None


def reduce_shards(vectors: Sequence[Tensor], layouts: Sequence[Hashable]) -> list[Tensor]:
    """Sum each vector over the ranks that hold shards of its parameters: one reduction for each layout.

    A collective for the ranks of a layout. Vectors of whole parameters stay as they are, and so do those of FSDP1, as
    under it a parameter may have a gradient on some ranks only. A mesh with several sharded dimensions takes one
    reduction for each of them.

    Args:
        vectors: n vectors computed from this rank's shards.
        layouts: the :func:`shard_layout` of each vector's parameters, n of them.

    Returns:
        n vectors of the same shapes.
    """
    sums = list(vectors)
    for layout in dict.fromkeys(layout for layout in layouts if layout not in (None, FSDP1_LAYOUT)):
        indices = [i for i, candidate in enumerate(layouts) if candidate == layout]
        joined = torch.cat([sums[i] for i in indices])
        mesh, dims = cast("tuple[DeviceMesh, tuple[int, ...]]", layout)
        for dim in dims:
            dist.all_reduce(joined, group=mesh.get_group(dim))
        for i, reduced in zip(indices, joined.split([len(sums[i]) for i in indices]), strict=True):
            sums[i] = reduced
    return sums


def sum_over_ranks(pairs: Sequence[tuple[Tensor, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """The sums and the counts of all ranks added up; a collective. A replica counts again in both.

    Args:
        pairs: this rank's (sum as a scalar tensor, number of entries summed); possibly none.
        like: a tensor on the device of the sums.

    Returns:
        The total of the sums and the total of the counts, as scalar tensors.
    """
    rows = [torch.stack([total, total.new_tensor(count)]) for total, count in pairs]
    totals = torch.stack([torch.zeros(2, device=like.device), *rows]).sum(0)
    dist.all_reduce(totals)
    return totals[0], totals[1]


def gather_from_shards(x: DTensor, indices: Tensor) -> Tensor:
    """The entries at flat positions of the whole tensor, shape (kept,), on every rank; a collective of that size.

    Args:
        x: a tensor in shards.
        indices: flat positions in C order in the whole tensor, shape (kept,), the same on every rank.
    """
    local = x.to_local().detach()
    held, local_indices = _local_indices(x, indices)
    values = torch.zeros(len(indices), dtype=local.dtype, device=local.device)
    values[held] = local.reshape(-1)[local_indices]
    # One rank holds an entry and all others have zero bits there. Added as numbers, -0.0 would become 0.0.
    bits = values.view(torch.uint8)
    for dim in _sharded_mesh_dims(x):
        dist.all_reduce(bits, group=x.device_mesh.get_group(dim))
    return values


def scatter_to_shards(x: DTensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite, in place, those of the entries that this rank holds.

    Args:
        x: a tensor in shards.
        indices: distinct flat positions in C order in the whole tensor, shape (kept,).
        values: the new entries, shape (kept,).
    """
    local = x.to_local().detach()
    held, local_indices = _local_indices(x, indices)
    local.view(-1).index_copy_(0, local_indices, values.to(local.device)[held])


def equal_shards(a: DTensor, b: DTensor) -> bool:
    """Whether two tensors of one layout are equal on all ranks; a collective."""
    equal = torch.tensor(torch.equal(a.to_local(), b.to_local()), device=a.to_local().device, dtype=torch.int32)
    for dim in range(a.device_mesh.ndim):
        dist.all_reduce(equal, dist.ReduceOp.MIN, group=a.device_mesh.get_group(dim))
    return bool(equal)


def _sharded_mesh_dims(x: DTensor) -> list[int]:
    return [dim for dim, placement in enumerate(x.placements) if placement.is_shard()]


def _local_indices(x: DTensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the flat positions this rank holds, as a mask (kept,), and the flat positions of those in its shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    flat = indices.to(x.to_local().device, torch.int64)
    held, local_flat = torch.ones_like(flat, dtype=torch.bool), torch.zeros_like(flat)
    stride = x.numel()
    for size, local_size, first in zip(x.shape, local_shape, offset, strict=True):
        stride //= max(size, 1)
        coordinate = flat // max(stride, 1) % max(size, 1) - first
        held &= (coordinate >= 0) & (coordinate < local_size)
        local_flat = local_flat * local_size + coordinate
    return held, local_flat[held]


def reshard(module: nn.Module) -> None:
    """Bring FSDP2's parameters back into shards.

    After a forward without a backward, as in validation, the parameters of the root stay whole, and those are not the
    tensors that the optimizer holds.
    """
    from torch.distributed.fsdp import FSDPModule  # a slow import that only training in shards needs

    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
