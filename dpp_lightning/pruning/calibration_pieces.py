"""A batch of a model's inputs by name, cut into pieces of some examples each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def pieces_of(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The batch in pieces of at most so many examples, in order; whole where its tensors differ in rows.

    Args:
        batch: name to tensor, of which the first dimension is the examples; tensors without one go into every piece.
        size: examples of a piece.
    """
    rows = {len(tensor) for tensor in batch.values() if tensor.dim()}
    if len(rows) != 1:
        return [dict(batch)]
    return [
        {name: tensor[start : start + size] if tensor.dim() else tensor for name, tensor in batch.items()}
        for start in range(0, rows.pop(), size)
    ]


def by_length(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with its examples in the order of their number of tokens, as its mask tells; as it is without one."""
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return dict(batch)
    order = torch.argsort((mask != 0).sum(1), stable=True)
    return {name: tensor[order] if tensor.dim() else tensor for name, tensor in batch.items()}


def without_padded_ends(piece: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The piece without the columns at its end that are padding of all its examples.

    Columns are taken off every tensor of the mask's shape. Padding before the tokens stays, as positions count from
    there in some models.
    """
    mask = piece.get("attention_mask")
    if mask is None or mask.dim() != 2 or not bool((mask != 0).any()):
        return dict(piece)
    length = int((mask != 0).any(0).nonzero().max()) + 1
    return {
        name: tensor[:, :length] if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape else tensor
        for name, tensor in piece.items()
    }
