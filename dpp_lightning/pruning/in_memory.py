"""The one road from two models to a delta: match them, draw by a spec, fit on calibration data.

:func:`prune` is its door for models in memory and on disk; pruning from checkpoint to folder, the callback and sweeps
call :func:`draw_and_fit`, or its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, cast
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import Weights, has_hf_names, load_tensors
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
        scope, include, exclude, outside, carry: which tensors are pruned, see
            :class:`dpp_lightning.pruning.scope.Scope`.
        calibration: for a method that fits q, eta or factors, or that weighs entries by the layers' inputs: a
            :class:`dpp_lightning.calibration.Calibration`.
        dtype: how kept values are held: float32, bfloat16, float16, int8 or int4; default the fine-tuned dtype, at
            most 32 bits.
        q: a q given by hand; then nothing is searched.
        method_settings: the method's own, such as ``budget="model"`` of ``magnitude``.

    Raises:
        TypeError: ``calibration`` is not calibration data.
        ValueError: an unknown method or setting, a rate outside [0, 1), weights that do not match or cannot be pruned,
            or a method that needs calibration data without it.
    """
    spec = PruningSpec(method, pruning_rate, seed, dtype, q, method_settings)
    if calibration is not None and not hasattr(calibration, "objective"):
        raise TypeError(
            f"calibration must be a dpp_lightning.calibration.Calibration, got {type(calibration).__name__}; wrap a "
            "function from a delta to a number as Calibration(function)"
        )
    spec.check_calibration(objective=calibration is not None, inputs=calibration is not None)
    plan = PruningPlan.of(
        _weights(base),
        _weights(finetuned),
        Scope(scope, tuple(include), tuple(exclude), outside, tuple(carry)),
        base_name=str(base) if isinstance(base, str | Path) else None,
        files=isinstance(finetuned, str | Path) and has_hf_names(finetuned),
    )
    return draw_and_fit(with_layer_inputs(plan, spec, calibration), spec, calibration)[0]


def with_layer_inputs(plan: PruningPlan, spec: PruningSpec, calibration: CalibrationSource | None) -> PruningPlan:
    """The plan, knowing what the layers see as input where the spec needs that.

    Raises:
        ValueError: the method cannot do without calibration data, and there is none.
    """
    inputs = calibration.layer_inputs() if calibration is not None and spec.needs_inputs else None
    spec.check_calibration(objective=calibration is not None, inputs=bool(inputs))
    return plan.with_inputs(inputs) if inputs else plan


def find_rescaling(
    plan: PruningPlan, spec: PruningSpec, delta: SparseDelta, calibration: CalibrationSource | None
) -> FoundRescaling | None:
    """What the spec's method fits on calibration data; None where it fits nothing or there is no data.

    Args:
        plan: both models.
        spec: what the delta was drawn by.
        delta: one mask, as :meth:`PruningPlan.draw` gives it.
        calibration: what the fit goes by.

    Raises:
        ValueError: the method cannot do without an objective, inputs or gradients that the data does not give.
    """
    if spec.fit is None or calibration is None:
        return None
    objective = calibration.objective(plan.replaced_base, gradients=spec.fit.needs_gradients)
    if objective is None:
        spec.check_calibration(objective=False, inputs=True)
        return None
    return Calibrator(plan.pairs, objective).fit(delta)


def draw_and_fit(
    plan: PruningPlan,
    spec: PruningSpec,
    calibration: CalibrationSource | None = None,
    found: FoundRescaling | None = None,
) -> tuple[SparseDelta, FoundRescaling | None]:
    """One pruned delta, with the q or weights that its method finds.

    Args:
        plan: both models, see :func:`with_layer_inputs`.
        spec: what is drawn.
        calibration: what a fit goes by; None leaves q at the method's own.
        found: what was found on another mask of the same method and rate; nothing is fitted then.

    Returns:
        The delta, its values in the spec's dtype, and what was found for it.

    Raises:
        ValueError: see :meth:`PruningPlan.stream` and :meth:`Calibrator.fit`.
    """
    delta = plan.draw(spec)
    if spec.q is not None:
        return delta.rescaled(spec.q), None
    found = found or find_rescaling(plan, spec, delta, calibration)
    if found is not None:
        delta = found.apply(delta)
    return cast(delta, plan.pairs, spec), found


def _weights(source: Weights) -> TensorSource:
    return source if isinstance(source, nn.Module | Mapping) else load_tensors(source)
