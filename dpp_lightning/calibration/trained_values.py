"""The fit of ``refit``: every kept value trained to give the fine-tuned model's outputs and hidden states."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from dpp_lightning.calibration.distillation import TrainingSettings
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate

STEPS = 400
_RATE, _RATE_AT = 0.02, 22_700  # learning rate where so many values are kept; it falls with the root of their number
_LEAST_RATE, _MOST_RATE = 1e-3, 3e-2
_FROM_DELTA = 0.01  # of the entries kept: with more, training starts from delta / q and not from 0


def fit_values(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """Train every kept value: the fit of ``refit``.

    It starts at 0, or where 1 - p >= 0.01 at delta / q with the best of a few q. The values are rounded in the loop to
    what the file holds. Kept is what is best on held-out data: the start, delta / q, or one of the steps.

    Args:
        calibrator: its objective trains.
        delta: kept entries with undivided values, float32.

    Returns:
        The rescaling that gives the trained delta: it belongs to this mask.
    """
    training = calibrator.distillation
    keep = keep_rate(delta.pruning_rate)
    untrained = {q: delta.rescaled(q) for q in sorted({keep, sqrt(keep), 1.0})}
    losses = {q: training.loss(candidate) for q, candidate in untrained.items()}
    best_q = min(losses, key=lambda q: losses[q])
    start = untrained[best_q] if keep >= _FROM_DELTA else _zeros(delta)
    rate = min(_MOST_RATE, max(_LEAST_RATE, _RATE * sqrt(_RATE_AT / max(delta.num_kept, 1))))
    settings = TrainingSettings.of(delta.info, STEPS, rate, dtype=calibrator.dtype)
    trained, tried = training.train(start, settings, calibrator.tell_step)
    after = min(value for _, value in tried)
    if losses[best_q] < after:
        trained, after = untrained[best_q], losses[best_q]
    said = {"texts": training.samples, "steps": settings.steps, "held_out_before": tried[0][1], "held_out_after": after}
    found = trained.with_changes(training=said)
    return FoundRescaling(lambda _: found, tried)


def _zeros(delta: SparseDelta) -> SparseDelta:
    tensors = {name: replace(kept, values=kept.values * 0) for name, kept in delta.tensors.items()}
    return delta.with_changes(tensors, q=1.0)
