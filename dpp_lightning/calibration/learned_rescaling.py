"""One trained coefficient a layer: W = W0 + D / (|c| + 1 - p), trained on the outputs of the fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi
from typing import Protocol

import torch
from torch import Tensor

from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate

LEARNING_RATE, EPOCHS, PATIENCE = 1e-2, 20, 4


class Learner(Protocol):
    """The model on calibration batches, of which the last is held out.

    Attributes:
        batches: how many there are, at least 2.
    """

    batches: int

    def loss(self, delta: SparseDelta, batch: int) -> float:
        """The top-5-logit squared error of base plus delta against the fine-tuned model on one batch."""
        ...

    def gradients(self, delta: SparseDelta, batch: int) -> dict[str, Tensor]:
        """Its gradient at the kept entries, by tensor: shape (kept,); tensors that play no part may be left out."""
        ...


def train_coefficients(
    learner: Learner, delta: SparseDelta, at: Callable[[Mapping[str, float]], SparseDelta]
) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
    """Train one coefficient c >= 0 for every pruned tensor, from 0 (DARE), with early stopping on the held-out batch.

    AdamW, learning rate 1e-2 with a cosine over 20 epochs, stopped after 4 epochs without a better held-out loss; the
    best coefficients are returned.

    Args:
        learner: the model on calibration batches.
        delta: kept entries with undivided values, q = 1 - p.
        at: coefficients by name to that delta.

    Returns:
        Coefficients by name, and (epoch, held-out loss) of every epoch.
    """
    keep, names = keep_rate(delta.pruning_rate), list(delta.tensors)
    c = torch.zeros(len(names), dtype=torch.float64)
    optimizer = torch.optim.AdamW([c], lr=LEARNING_RATE, weight_decay=0.0)
    held_out, training = learner.batches - 1, range(learner.batches - 1)
    best, best_c = learner.loss(delta, held_out), c.clone()
    tried, waited = [(0.0, best)], 0
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + cos(pi * epoch / EPOCHS)) / 2
        for batch in training:
            gradients = learner.gradients(at(dict(zip(names, c.tolist(), strict=True))), batch)
            c.grad = torch.zeros_like(c)
            for i, name in enumerate(names):
                if name in gradients:  # d/dc of D / (c + 1 - p)
                    slope = (gradients[name].double() * delta.tensors[name].values.double()).sum()
                    c.grad[i] = -slope / (c[i] + keep) ** 2
            optimizer.step()
            c.clamp_(min=0.0)
        value = learner.loss(at(dict(zip(names, c.tolist(), strict=True))), held_out)
        tried.append((epoch + 1.0, value))
        waited += 1
        if value < best:
            best, best_c, waited = value, c.clone(), 0
        elif waited >= PATIENCE:
            break
    return dict(zip(names, best_c.tolist(), strict=True)), tuple(tried)
