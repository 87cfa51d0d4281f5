"""Whether the values of a tensor are finite, and how many are not: NaN, infinity."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from dpp_lightning.tensors.shards import full_sum, is_dtensor

_BLOCK = 1 << 18  # entries that are read at once, few enough to stay in a core's cache


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; of a tensor in shards a collective, with one answer on all ranks.

    A sum is taken, several times as fast as a test of every entry: one NaN or infinity makes it NaN or infinite. Only
    where it is, which in a narrow dtype may be its own overflow, are the entries themselves looked at.

    Args:
        tensor: any shape, dtype and device; integers are finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = tensor.detach()
    if is_dtensor(tensor):  # in float64 the sum cannot overflow
        return isfinite(float(full_sum(tensor, torch.float64)))
    if tensor.device.type != "cpu":
        return isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
    return all(
        isfinite(float(block.sum())) or bool(torch.isfinite(block).all()) for block in tensor.reshape(-1).split(_BLOCK)
    )


def count_non_finite(tensor: Tensor) -> tuple[int, int, int]:
    """How many entries are NaN, +infinity and -infinity; of a tensor in shards a collective."""
    if is_finite(tensor):
        return 0, 0, 0
    tensor = tensor.detach()
    tests = (tensor != tensor, tensor == torch.inf, tensor == -torch.inf)
    nan, positive, negative = (int(full_sum(test, torch.int64)) for test in tests)
    return nan, positive, negative
