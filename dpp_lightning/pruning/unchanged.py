"""Tensors that training left as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.names import NamedTensor
from dpp_lightning.tensors.shards import equal_shards, is_dtensor

_PROBE = 4096  # entries compared before whole tensors are


def same_values(finetuned: Tensor, base: Tensor) -> bool:
    """Whether a fine-tuned tensor is the base's, so that it needs no delta.

    It is where dtype, shape and all values are equal. In another dtype a tensor has a delta, which is what the cast
    rounded, but for one with infinities, such as a mask: that has no delta, and is the base's if it is what the base's
    becomes by the cast, with the infinities in the same places.

    Args:
        finetuned, base: of one name; of two in shards a collective.
    """
    if finetuned.shape != base.shape:
        return False
    cast = finetuned.dtype != base.dtype
    if is_dtensor(finetuned) and is_dtensor(base):
        return not cast and equal_shards(finetuned, base)
    if cast and (is_dtensor(finetuned) or is_dtensor(base)):
        return False
    a, b = finetuned.detach().reshape(-1), base.detach().reshape(-1)
    if not cast:  # most tensors differ at once: the rest is not read
        return torch.equal(a[:_PROBE], b[:_PROBE].to(a.device)) and torch.equal(a, b.to(a.device))
    return _same_after_cast(a[:_PROBE], b[:_PROBE]) and not is_finite(a) and _same_after_cast(a, b)


def without_idle(
    finetuned: Mapping[str, Tensor], named: Iterable[NamedTensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A module's tensors without those that lie beside its transformers model and did not change.

    They are constants of the module, such as the class weights of a loss. The model's own files do not have them, and
    a delta that asked its base for them would not fit these.

    Args:
        finetuned, base: canonical name to tensor.
        named: the fine-tuned module's tensors.
    """
    named = list(named)
    if not any(n.in_model for n in named):
        return dict(finetuned)
    beside = {n.name for n in named if not n.in_model}
    return {
        name: tensor
        for name, tensor in finetuned.items()
        if not (name in beside and name in base and same_values(tensor, base[name]))
    }


def _same_after_cast(a: Tensor, b: Tensor) -> bool:
    """Whether the first is what the second becomes in its dtype, and none of its infinities came about by that."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return False
    b = b.to(a.device)
    return torch.equal(a, b.to(a.dtype)) and torch.equal(a.isinf(), b.isinf())
