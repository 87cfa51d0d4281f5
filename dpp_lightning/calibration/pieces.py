"""A batch of calibration data, cut into pieces of some samples each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def samples_of(batch: Any) -> int:
    """How many samples a batch of any structure has, as its tensors say; 0 where these differ or there are none."""
    rows: set[int] = set()
    tree_map(lambda leaf: rows.add(len(leaf)) if isinstance(leaf, Tensor) and leaf.dim() else None, _as_tree(batch))
    return rows.pop() if len(rows) == 1 else 0


def pieces_of(batch: Any, size: int) -> list[Any]:
    """The batch in pieces of at most so many samples, in order; whole where its tensors differ in rows.

    Args:
        batch: tensors in mappings, lists and tuples, of which the first dimension is the samples; what is no tensor, or
            has no dimension, goes into every piece.
        size: samples of a piece.
    """
    tree, samples = _as_tree(batch), samples_of(batch)
    if not samples:
        return [tree]

    def cut(leaf: Any, start: int) -> Any:
        return leaf[start : start + size] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return [tree_map(lambda leaf, at=start: cut(leaf, at), tree) for start in range(0, samples, size)]


def training_pieces(batch: Any, size: int) -> list[Any]:
    """The batch in pieces of samples of similar length, without what is padding of a whole piece.

    Args:
        batch: as for :func:`pieces_of`; only mappings with an ``attention_mask`` are sorted and cut at their ends.
        size: samples of a piece.
    """
    tree = _as_tree(batch)
    if not isinstance(tree, dict):
        return pieces_of(tree, size)
    return [without_padded_ends(piece) for piece in pieces_of(by_length(tree), size)]


def _as_tree(batch: Any) -> Any:
    """Mappings of other types, which are no trees to torch, as dictionaries."""
    return dict(batch.items()) if isinstance(batch, Mapping) else batch


def by_length(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its examples in the order of their number of tokens, as its mask tells; as it is without one."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or samples_of(batch) != len(mask):
        return dict(batch)
    order = torch.argsort((mask != 0).sum(1), stable=True)
    sort = partial(tree_map, lambda leaf: leaf[order] if isinstance(leaf, Tensor) and leaf.dim() else leaf)
    return {name: sort(value) for name, value in batch.items()}


def without_padded_ends(piece: Mapping[str, Any]) -> dict[str, Any]:
    """The piece without the columns at its end that are padding of all its examples.

    Columns are taken off every tensor of the mask's shape. Padding before the tokens stays, as positions count from
    there in some models.
    """
    mask = piece.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool((mask != 0).any()):
        return dict(piece)
    length = int((mask != 0).any(0).nonzero().max()) + 1

    def of_tokens(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() >= 2 and value.shape[:2] == mask.shape

    return {name: value[:, :length] if of_tokens(value) else value for name, value in piece.items()}
