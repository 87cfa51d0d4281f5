"""Masks of sparse fine-tuning: which entries are trained, chosen before the training begins.

The mask by mean squared gradients, an estimate of Fisher's information, is that of Sung, Nair and Raffel (2021),
https://arxiv.org/abs/2111.09839.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpp_lightning.methods import selections
from dpp_lightning.methods.selections import Budget
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.sampling.sampler import kept_positions_of


def random_positions(tensors: Mapping[str, Tensor], pruning_rate: float, seed: int) -> dict[str, Tensor]:
    """The entries that ``dare`` and ``random-drop`` keep at this rate and seed, whatever the values.

    Args:
        tensors: canonical name to tensor.
        pruning_rate: fraction of the entries that is not trained, in [0, 1).
        seed: mask seed, an integer >= 0.

    Returns:
        Canonical name to sorted flat positions, int64, on the CPU, shape (kept,).

    Raises:
        ValueError: the rate or the seed is outside its range.
    """
    sizes = [(name, tensor.numel()) for name, tensor in tensors.items()]
    drawn = kept_positions_of(sizes, pruning_rate, seed)
    return {name: torch.from_numpy(positions) for (name, _), positions in zip(sizes, drawn, strict=True)}


def highest_positions(scores: Mapping[str, Tensor], pruning_rate: float, budget: Budget) -> dict[str, Tensor]:
    """The n - floor(p n) entries of the largest absolute scores; where they are equal, the first.

    Args:
        scores: canonical name to a score for each entry, any float dtype.
        pruning_rate: p, the fraction of the entries that is not trained, in [0, 1).
        budget: ``model`` counts n over all tensors, ``tensor`` in each.

    Returns:
        Canonical name to sorted flat positions, int64, on the CPU, shape (kept,).

    Raises:
        ValueError: the rate is outside its range, the budget unknown, or a score not finite.
    """
    pairs = [
        TensorPair.of(name, torch.zeros((), device=score.device).expand(score.numel()), score.reshape(-1))
        for name, score in scores.items()
    ]
    kept = selections.magnitude(pairs, pruning_rate, 0, budget=budget)
    return {pair.name: entries.positions for pair, entries in zip(pairs, kept, strict=True)}
