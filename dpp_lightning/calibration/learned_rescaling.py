"""One trained coefficient a layer: W = W0 + D / (|c| + 1 - p), trained on the outputs of the fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi

import torch

from dpp_lightning.calibration.calibration_data import OutputGradients
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, weighted
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate, learned_q

LEARNING_RATE, EPOCHS, PATIENCE = 1e-2, 20, 4


def train_coefficients(
    output: OutputGradients,
    delta: SparseDelta,
    with_coefficients: Callable[[Mapping[str, float]], SparseDelta],
    tell: Callable[[str], object],
) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
    """Train one coefficient c >= 0 for every pruned tensor, from 0 (DARE), with early stopping on the held-out batch.

    AdamW, learning rate 1e-2 with a cosine over 20 epochs, stopped after 4 epochs without a better held-out loss; the
    best coefficients are returned.

    Args:
        output: the model on calibration batches.
        delta: kept entries with undivided values, q = 1 - p.
        with_coefficients: coefficients by name to that delta.
        tell: called with a text in every epoch.

    Returns:
        Coefficients by name, and (epoch, held-out loss) of every epoch.
    """
    keep, names = keep_rate(delta.pruning_rate), list(delta.tensors)
    c = torch.zeros(len(names), dtype=torch.float64)
    optimizer = torch.optim.AdamW([c], lr=LEARNING_RATE, weight_decay=0.0)
    held_out, training = output.batches - 1, range(output.batches - 1)
    best, best_c = output.loss(delta, held_out), c.clone()
    tried, waited = [(0.0, best)], 0
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + cos(pi * epoch / EPOCHS)) / 2
        for batch in training:
            gradients = output.gradients(with_coefficients(dict(zip(names, c.tolist(), strict=True))), batch)
            c.grad = torch.zeros_like(c)
            for i, name in enumerate(names):
                if name in gradients:  # d/dc of D / (c + 1 - p)
                    slope = (gradients[name].double() * delta.tensors[name].values.double()).sum()
                    c.grad[i] = -slope / (c[i] + keep) ** 2
            optimizer.step()
            c.clamp_(min=0.0)
        value = output.loss(with_coefficients(dict(zip(names, c.tolist(), strict=True))), held_out)
        tried.append((epoch + 1.0, value))
        tell(f"epoch {epoch + 1} of at most {EPOCHS}, loss {value:.3g}")
        waited += 1
        if value < best:
            best, best_c, waited = value, c.clone(), 0
        elif waited >= PATIENCE:
            break
    return dict(zip(names, best_c.tolist(), strict=True)), tuple(tried)


def fit_coefficients(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """One trained coefficient a tensor (released code of DAREx): the fit of ``darex-learned``.

    Args:
        calibrator: its objective has gradients.
        delta: kept entries with undivided float32 values, q = 1 - p.
    """
    rate = delta.pruning_rate
    assert calibrator.objective.gradients is not None

    def weights(coefficients: Mapping[str, float]) -> dict[str, float]:
        return {name: keep_rate(rate) / learned_q(c, rate) for name, c in coefficients.items()}

    coefficients, tried = train_coefficients(
        calibrator.objective.gradients, delta, lambda candidate: weighted(delta, weights(candidate)), calibrator.tell
    )
    return FoundRescaling(lambda other: weighted(other, weights(coefficients)), tried)
