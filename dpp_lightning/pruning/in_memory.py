"""prune(): the one way from two models to a SparseDelta, used by the callback and from Python alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dpp_lightning.calibration.fit_rescaling import Bench, cast, fitting_dtype
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.registry import get_method
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import Weights, has_own_names, load_tensors
from dpp_lightning.tensors.names import TensorSource

Objective = Callable[[SparseDelta], float]


def prune(
    base: Weights,
    finetuned: Weights,
    method: str = "darex-q",
    pruning_rate: float = 0.9,
    seed: int = 0,
    scope: Literal["all", "linear"] = "all",
    carry: Sequence[str] = (),
    calibration: Objective | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    outside: Literal["carry", "revert"] = "carry",
    dtype: str | None = None,
    q: float | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    **method_settings: Any,
) -> SparseDelta:
    """Prune the delta between two models.

    Args:
        base: pre-trained weights: module, state dict, local folder or file, or hub id. Files are mapped, not loaded.
        finetuned: fine-tuned weights, likewise.
        method: a name of ``METHODS``.
        pruning_rate: fraction of the delta dropped, in [0, 1).
        seed: mask seed, an integer >= 0.
        scope, include, exclude, outside, carry: which tensors are pruned, see
        :class:`dpp_lightning.pruning.scope.Scope`.
        calibration: for a method that searches q, eta or factors: candidate delta to a number to be minimised, such as
            the output change on one batch, or minus a score.
        dtype: how kept values are held: float32, bfloat16, float16, int8 or int4; default the fine-tuned dtype, at
            most 32 bits.
        q: a q given by hand; then nothing is searched.
        inputs: what the layers of the fine-tuned model see on calibration data, from
            :func:`dpp_lightning.calibration.input_collector.collected_inputs`; for ``wanda``, ``darex-q-layer`` and
            ``score="activation"``.
        method_settings: the method's own, such as ``budget="model"`` of ``magnitude``.

    Raises:
        ValueError: an unknown method or setting, a rate outside [0, 1), weights that do not match or cannot be pruned,
            a method that searches q without ``q=`` and ``calibration=``, or that needs ``inputs=`` without them.
    """
    row = get_method(method)
    row.check(pruning_rate, method_settings)
    row.check_q(method, pruning_rate, q, searched=calibration is not None)
    settings = Scope(scope, tuple(include), tuple(exclude), outside, tuple(carry))
    plan = PruningPlan.of(
        _weights(base),
        _weights(finetuned),
        settings,
        base_name=_name(base),
        files=isinstance(finetuned, str | Path) and has_own_names(finetuned),
    )
    if inputs:
        plan = plan.with_inputs(inputs)
    delta = plan.draw(method, pruning_rate, seed, fitting_dtype(method, dtype), method_settings)
    if q is not None:
        return delta.rescaled(q)
    if row.fitted and calibration is not None and pruning_rate > 0:
        delta = Bench(plan, calibration).fit(delta).apply(delta)
    return cast(delta, plan, dtype)


def _weights(source: Weights) -> TensorSource:
    if isinstance(source, nn.Module | Mapping):
        return source
    return load_tensors(source)


def _name(source: Weights) -> str | None:
    return str(source) if isinstance(source, str | Path) else None
