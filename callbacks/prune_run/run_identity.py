"""What makes two runs of the callback the same one: rows of the one may stand beside rows of the other."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights, new_names
from dpp_lightning.callbacks.prune_run.evaluation import EvaluationPasses
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.names import canonical_tensors

if TYPE_CHECKING:
    from dpp_lightning.callbacks.delta_prune import DeltaPruneCallback

ROUNDING = 0.005  # other kernels or thread counts may turn a few samples, another data set turns more


def run_identity(
    settings: DeltaPruneCallback, module: pl.LightningModule, base: BaseWeights, passes: EvaluationPasses
) -> dict[str, Any]:
    """Plain values that all rows of a run share; methods, rates and further seeds may be added to a run later.

    Args:
        settings: the callback.
        module: holds the fine-tuned weights.
        base: theta_0.
        passes: how it is scored.
    """
    return {
        "base": base.fingerprint(module, new_names(module, passes.trainer.optimizers), settings.scope.carry),
        "fine-tuned": hash_tensors(canonical_tensors(module)),
        "monitor": passes.monitor,
        "split": passes.split,
        "objective": settings.objective,
        "calibration_samples": settings.calibration_samples,
        "output_layer": settings.layer(module),
        "output_measure": settings.output_measure,
        "first seed": settings.seeds[0],
        "dtype": settings.dtype,
        "scope": asdict(settings.scope),
    }


def check_score(before: float, now: float, monitor: str, file: object) -> None:
    """Refuse to go on where the fine-tuned model's score is no longer what the run's file says.

    Raises:
        ValueError: as said.
    """
    if abs(before - now) > ROUNDING * max(1.0, abs(before)):
        raise ValueError(
            f"{file} has {monitor} {before:.6g} of the fine-tuned model, which scores {now:.6g} now: the data or its "
            "settings are others. Repeat the command as it was, or choose another output folder"
        )
