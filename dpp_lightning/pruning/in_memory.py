"""prune(): from two models in memory or on disk to a SparseDelta in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.delta.empty_delta import warn_if_empty
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.finetuned_source import read_finetuned
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import Weights, load_tensors
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.names import TensorSource


def prune(
    base: Weights,
    finetuned: Weights,
    method: str = "dare",
    pruning_rate: float = 0.9,
    seed: int = 0,
    scope: Literal["all", "linear"] = "all",
    carry: Sequence[str] = (),
    calibration: CalibrationSource | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    outside: Literal["carry", "revert"] = "carry",
    blocks: Sequence[str] = (),
    dtype: str | None = None,
    q: float | None = None,
    **method_settings: Any,
) -> SparseDelta:
    """Prune the delta between two models.

    Args:
        base: pre-trained weights: module, state dict, local folder or file, or hub id. Files are mapped, not loaded.
        finetuned: fine-tuned weights, likewise.
        method: a name of ``METHODS``.
        pruning_rate: fraction of the delta that is dropped, in [0, 1).
        seed: mask seed, an integer >= 0.
        scope, include, exclude, outside, carry, blocks: which tensors are pruned, and where the model's blocks are,
            see :class:`dpp_lightning.pruning.scope.Scope`.
        calibration: for a method that fits q, eta or factors, or that weighs entries by the layers' inputs: a
            :class:`dpp_lightning.calibration.Calibration`.
        dtype: how kept values are held: float32, bfloat16, float16, float64, int8, int4, int3 or int2; default the
            fine-tuned dtype, at most 32 bits, and at rate 0 one in which nothing is rounded.
        q: a q given by hand; then nothing is searched.
        method_settings: the method's own, such as ``budget="model"`` of ``magnitude``.

    Raises:
        TypeError: ``calibration`` is not calibration data.
        ValueError: an unknown method or setting, a rate outside [0, 1), weights that do not match or cannot be pruned,
            a method that needs calibration data without it, or one that goes by blocks on a model in which none is
            found.
    """
    spec = PruningSpec(method, pruning_rate, seed, dtype, q, method_settings)
    if calibration is not None and not hasattr(calibration, "objective"):
        raise TypeError(
            f"calibration must be a dpp_lightning.calibration.Calibration, got {type(calibration).__name__}; wrap a "
            "function from a delta to a number as Calibration(function)"
        )
    spec.check_calibration(objective=calibration is not None, inputs=calibration is not None)
    for source, argument in ((base, "base"), (finetuned, "finetuned")):
        if isinstance(source, str | Path):
            check_model(source, argument)
    tuned, exact = _finetuned(finetuned, base)
    plan = PruningPlan.of(
        base if isinstance(base, nn.Module | Mapping) else load_tensors(base),
        tuned,
        Scope.of(scope, include, exclude, outside, carry, blocks),
        base_name=str(base) if isinstance(base, str | Path) else None,
        files=exact,
    )
    plan.checks.check_changed()
    delta = plan.for_spec(spec, calibration).draw_and_fit(spec, calibration)[0]
    warn_if_empty(delta.contents, "the pruned delta")
    return delta


def _finetuned(source: Weights, base: Weights) -> tuple[TensorSource, bool]:
    """The weights, and whether their names are those of the model's own files."""
    if isinstance(source, nn.Module | Mapping):
        return source, False
    read = read_finetuned(source, base=base if isinstance(base, str | Path) else None)
    return read.tensors, read.exact
