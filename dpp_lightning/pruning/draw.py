"""The one road from two models to a delta: draw by a spec, fit on calibration data, hold values as the file will."""

from __future__ import annotations

from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, cast
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan


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
