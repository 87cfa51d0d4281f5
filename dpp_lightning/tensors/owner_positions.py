"""From kept positions of the tensors as the model's files hold them to positions in the parameters of a module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from dpp_lightning.tensors.hf_layout import FilePlace
from dpp_lightning.tensors.names import NamedTensor


def positions_in_owners(named: Iterable[NamedTensor], positions: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """The kept flat positions of every parameter, of which the files may hold parts, or which may be a part itself.

    Args:
        named: tensors of a module, see :func:`dpp_lightning.tensors.names.named_tensors`.
        positions: canonical name to sorted distinct flat positions, int64, on the CPU, shape (kept,); a tensor without
            an entry keeps none.

    Returns:
        Each tensor of the module to its own sorted distinct flat positions, int64, on the CPU.
    """
    found: dict[Tensor, list[Tensor]] = {}
    nothing = torch.empty(0, dtype=torch.int64)
    for tensor in named:
        kept, start = positions.get(tensor.name, nothing), 0
        for owner, place in tensor.pieces:
            stop = start + (owner.numel() if place.size is None else prod(place.size))
            first, last = torch.searchsorted(kept, torch.tensor([start, stop])).tolist()
            found.setdefault(owner, []).append(_in_source(kept[first:last] - start, place))
            start = stop
    return {owner: pieces[0] if len(pieces) == 1 else torch.cat(pieces).sort()[0] for owner, pieces in found.items()}


def _in_source(positions: Tensor, place: FilePlace) -> Tensor:
    """Flat positions in a part of a tensor, as flat positions in that tensor."""
    if place.size is None or place.stride is None:
        return positions
    flat = torch.full_like(positions, place.offset)
    for coordinate, stride in zip(torch.unravel_index(positions, place.size), place.stride, strict=True):
        flat += coordinate * stride
    return flat
