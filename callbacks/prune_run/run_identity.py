"""Whether two runs of the callback are the same one, so that their rows may stand in one file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from dpp_lightning._version import __version__
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.names import canonical_tensors

# Other kernels or numbers of threads may turn the prediction of a few samples; another data set turns more of them.
ROUNDING = 0.005


def run_identity(
    settings: PruneSettings,
    base: BaseWeights,
    module: nn.Module,
    new: set[str],
    monitor: str,
    split: str,
    *,
    precision: str,
    limit: float | None = None,
    data: object = None,
) -> dict[str, Any]:
    """What all rows of a run have in common, as plain values for its file.

    Methods, rates and seeds after the first are no part of it, so that a run may be continued with more of them.

    Args:
        settings: of the callback.
        base: theta_0.
        module: holds the fine-tuned weights.
        new: canonical names of the parameters that were new in this training.
        monitor, split: name of the score, and of the data that it is of.
        precision: that scores are computed in.
        limit: share of the split's batches, or their number, that is scored; None for all.
        data: what gives it; a DataModule's ``split_seed`` and ``fractions``, if it has them, say which samples are held
            out for calibration.
    """
    return {
        "dpp_lightning": ".".join(__version__.split(".")[:2]),  # defaults are part of its rows
        "base": base.fingerprint(module, new, settings.scope.carry),
        "fine-tuned": hash_tensors(canonical_tensors(module)),
        "monitor": monitor,
        "split": split,
        "precision": precision,
        "limit of batches": None if isinstance(limit, float) and limit == 1 else limit,
        "split_seed": getattr(data, "split_seed", None),
        "fractions": getattr(data, "fractions", None),
        "objective": settings.objective,
        "calibration_samples": settings.calibration_samples,
        "output_layer": settings.output_layer_of(module),
        "output_measure": settings.output_measure,
        "first seed": settings.seeds[0],
        "dtype": settings.dtype,
        "scope": asdict(settings.scope),
    }


def check_score(before: float, now: float, monitor: str, file: object) -> None:
    """Refuse to continue a run whose file has another score of the fine-tuned model.

    Args:
        before: the score in the file.
        now: the score of the weights that are loaded.
        monitor: name of the score.
        file: the run's file, for the message.

    Raises:
        ValueError: if the scores differ by more than rounding.
    """
    if abs(before - now) > ROUNDING * max(1.0, abs(before)):
        raise ValueError(
            f"{file} has {monitor} {before:.6g} of the fine-tuned model, which scores {now:.6g} now: the data or its "
            "settings are others. Repeat the command as it was, or choose another output folder"
        )
