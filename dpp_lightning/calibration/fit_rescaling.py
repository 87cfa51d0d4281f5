"""Fits: what a method finds on calibration data once its entries are chosen, as weights of the kept values and q."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.calibration.dpa import (
    amplified,
    partition_rates,
    random_partitions,
    ranked_partitions,
    search_factors,
)
from dpp_lightning.calibration.layer_sums import LayerSums, layer_sums
from dpp_lightning.calibration.learned_rescaling import Learner, train_coefficients
from dpp_lightning.calibration.q_search import SearchResult, search_eta, search_q, search_q_by_score
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.layerwise_rates import dp_counts
from dpp_lightning.methods.registry import Fitted, get_method
from dpp_lightning.methods.rescaling import keep_rate, layer_q, learned_q
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.tensors.dtypes import to_dtype

Apply = Callable[[SparseDelta], SparseDelta]


@dataclass(frozen=True)
class Fit:
    """What was found on one mask; it serves every mask of the same method and rate.

    Attributes:
        apply: gives a delta its weights and q.
        tried: every candidate with its objective.
    """

    apply: Apply
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bench:
    """Calibration data, as what can be asked of it.

    Attributes:
        plan: base and fine-tuned weights, with the inputs of the layers where a method needs them.
        cost: a candidate delta to a number to be minimised: the output change, or minus a metric.
        smooth: the cost is continuous, so that a scalar minimiser may be used; a metric is a step function.
        learner: gives gradients of the output's error, for ``darex-learned``.
    """

    plan: PruningPlan
    cost: Callable[[SparseDelta], float]
    smooth: bool = True
    learner: Learner | None = None

    def fit(self, delta: SparseDelta) -> Fit:
        """Find what the delta's method fits.

        Args:
            delta: a mask of the method, drawn with :func:`fitting_dtype`.

        Raises:
            ValueError: the method has nothing to fit, or data that this bench has not.
        """
        fitted = get_method(delta.info.method).fitted
        if fitted is None:
            raise ValueError(f"{delta.info.method} has nothing to fit on calibration data")
        return _FITS[fitted](self, delta)


def fitting_dtype(method: str, dtype: str | None) -> str | None:
    """The dtype to draw in: that of the file, or float32 where the fit gives the values weights."""
    return dtype if get_method(method).fitted in (None, "q") else "float32"


def cast(delta: SparseDelta, plan: PruningPlan, dtype: str | None) -> SparseDelta:
    """A delta drawn by :func:`fitting_dtype` with its values as the file holds them."""
    if fitting_dtype(delta.info.method, dtype) == dtype:
        return delta
    tensors = {
        name: replace(part, values=to_dtype(part.values, dtype, plan.finetuned[name], name))
        for name, part in delta.tensors.items()
    }
    return SparseDelta(tensors, delta.carried, replace(delta.info, dtype=dtype), delta.new_rows)


def weighted(delta: SparseDelta, weights: Mapping[str, float | Tensor], **found: Any) -> SparseDelta:
    """The same entries with their float32 values times one weight a tensor or an entry.

    Args:
        delta: the delta.
        weights: canonical name to a number, or to a tensor of shape (kept,).
        found: what was found, for the delta's settings.
    """
    tensors = {name: replace(part, values=part.values * weights[name]) for name, part in delta.tensors.items()}
    info = replace(delta.info, settings={**delta.info.settings, **found})
    return SparseDelta(tensors, delta.carried, info, delta.new_rows)


def _fit_q(bench: Bench, delta: SparseDelta) -> Fit:
    """One q for the model (DAREx-q)."""
    rate = delta.pruning_rate
    if bench.smooth:
        found = search_q(lambda q: bench.cost(delta.rescaled(q)), rate)
    else:
        found = search_q_by_score(lambda q: bench.cost(delta.rescaled(q)), rate, higher_is_better=False)
    return Fit(lambda other: other.rescaled(found.q), found.tried)


def _fit_layers(bench: Bench, delta: SparseDelta) -> Fit:
    """One q a layer in closed form, with the eta that serves the model best (DAREx, per-layer **q**)."""
    if not bench.plan.inputs:
        raise ValueError(f"{delta.info.method} needs the layers' inputs on calibration data, and there is none")
    sums = layer_sums(bench.plan)
    rows = delta.info.settings.get("rows", "mean")

    def at(eta: float) -> Apply:
        weights = _layer_weights(sums, delta.tensors, delta.pruning_rate, eta, rows)
        return lambda other: weighted(other, weights, eta=eta)

    found: SearchResult = search_eta(lambda eta: bench.cost(at(eta)(delta)), smooth=bench.smooth)
    return Fit(at(found.q), found.tried)


def _layer_weights(sums: LayerSums, names: Mapping[str, Any], rate: float, eta: float, rows: Any) -> dict[str, float]:
    """(1 - p) / q of every tensor: its layer's, or that of the mean q of all layers where it has no inputs."""
    q = {name: layer_q(*pair, rate, eta, rows=rows) for name, pair in sums.of_weight.items()}
    mean = sum(q.values()) / len(q) if q else keep_rate(rate)
    return {name: keep_rate(rate) / q.get(sums.weight_of.get(name, name), mean) for name in names}


def _fit_learned(bench: Bench, delta: SparseDelta) -> Fit:
    """One trained coefficient a tensor (released code of DAREx)."""
    if bench.learner is None:
        raise ValueError(
            f"{delta.info.method} trains on calibration batches: use DeltaPruneCallback, dpp sweep, or dpp prune "
            "--calibration"
        )
    rate = delta.pruning_rate

    def at(coefficients: Mapping[str, float]) -> SparseDelta:
        return weighted(delta, {n: keep_rate(rate) / learned_q(c, rate) for n, c in coefficients.items()})

    found, tried = train_coefficients(bench.learner, delta, at)
    weights = {name: keep_rate(rate) / learned_q(c, rate) for name, c in found.items()}
    return Fit(lambda other: weighted(other, weights), tried)


def _fit_partitions(bench: Bench, delta: SparseDelta) -> Fit:
    """A factor for each partition (DPA), upward from 1, or downward from DARE's on a random selection."""
    rates = partition_rates(delta.pruning_rate)
    step = 0.1 if delta.q == 1 else -0.1

    def at(other: SparseDelta, parts: Mapping[str, Tensor], factors: Sequence[float]) -> SparseDelta:
        weights = {name: amplified(torch.ones(len(part)), part, factors) for name, part in parts.items()}
        return weighted(other, weights, factors=list(factors), partitions=rates)

    own = _partitions(bench.plan, delta, rates)  # once for all candidates
    factors, tried = search_factors(lambda candidate: bench.cost(at(delta, own, candidate)), len(rates), step)
    return Fit(lambda other: at(other, _partitions(bench.plan, other, rates), factors), tried)


def _partitions(plan: PruningPlan, delta: SparseDelta, rates: Sequence[float]) -> dict[str, Tensor]:
    """Partition of every kept entry, by tensor."""
    info = delta.info
    if info.seeded:
        return {
            name: random_partitions(name, part.indices, plan.finetuned[name].numel(), rates, info.seed)
            for name, part in delta.tensors.items()
        }
    own = get_method(info.method).selection_settings(info.settings)
    counts = dp_counts(plan.pairs, rates, **own)
    by_name = {pair.name: [row[i] for row in counts] for i, pair in enumerate(plan.pairs)}
    return {name: ranked_partitions(part.values, by_name[name]) for name, part in delta.tensors.items()}


_FITS: dict[Fitted, Callable[[Bench, SparseDelta], Fit]] = {
    "q": _fit_q,
    "layer": _fit_layers,
    "learned": _fit_learned,
    "partitions": _fit_partitions,
}
