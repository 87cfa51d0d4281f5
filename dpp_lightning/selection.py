"""Selections: which entries of a delta stay. Pure functions; every one returns sorted flat positions of one tensor."""

from typing import Protocol

import torch
from torch import Tensor

from dpp_lightning.sampling import kept_positions


class Selection(Protocol):
    """One selection: canonical name, base and fine-tuned tensor (any shape, equal), rate and seed to kept positions."""

    def __call__(self, name: str, base: Tensor, finetuned: Tensor, pruning_rate: float, seed: int) -> Tensor: ...


def random(name: str, base: Tensor, finetuned: Tensor, pruning_rate: float, seed: int) -> Tensor:
    """Keep each entry independently with probability 1 - p (DARE, Yu et al. 2024), whatever its value.

    Returns:
        Sorted flat positions, int64, on the CPU: a function of (seed, name, position) alone, see
        :mod:`dpp_lightning.sampling`.
    """
    return torch.from_numpy(kept_positions(name, finetuned.numel(), pruning_rate, seed))
