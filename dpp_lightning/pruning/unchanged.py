"""Tensors that training left as they were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dpp_lightning.tensors.names import NamedTensor
from dpp_lightning.tensors.shards import equal_shards, is_dtensor

_PROBE = 4096  # entries compared before whole tensors are


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and equal values."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if is_dtensor(a) and is_dtensor(b):
        return equal_shards(a, b)
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    if not torch.equal(a[:_PROBE], b[:_PROBE].to(a.device)):  # most tensors differ at once: the rest is not read
        return False
    return torch.equal(a, b.to(a.device))


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
        if not (name in beside and name in base and is_same(tensor, base[name]))
    }
