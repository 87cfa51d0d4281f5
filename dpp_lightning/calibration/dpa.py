"""DPA: kept entries in partitions, one for each of several rates, and the search for a factor for each of them.

Partition 1 is what the strictest rate keeps, partition 2 what the next one adds, and so on down to the target rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, weighted
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.layerwise_rates import dp_counts
from dpp_lightning.methods.registry import get_method
from dpp_lightning.sampling.sampler import exact_rate, uniform_words

_MOST_STEPS = 100  # of the search for one partition's factor


def partition_rates(pruning_rate: float) -> list[float]:
    """0.9, 0.8, ... down to the target rate p; the target alone where p >= 0.9.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    target = float(exact_rate(pruning_rate))
    return [*(r / 10 for r in range(9, 0, -1) if r / 10 > target), target]


def amplified(delta: Tensor, partition: Tensor, factors: Sequence[float]) -> Tensor:
    """Kept deltas times the factor of their partition; a factor of 0 takes a partition out.

    Args:
        delta: kept values, shape (kept,).
        partition: number of each entry's partition, int64, shape (kept,).
        factors: one for each partition.
    """
    return delta * torch.tensor(factors, dtype=torch.float32)[partition]


def ranked_partitions(delta: Tensor, counts: Sequence[int]) -> Tensor:
    """Partition of each kept entry of one tensor, by its rank in |delta|; of equal entries the first ranks higher.

    Args:
        delta: kept values, shape (kept,).
        counts: how many entries of the tensor each rate keeps, strictest first; the last is all of them.
    """
    order = torch.sort(delta.float().abs(), descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    edges = torch.tensor(counts[:-1], dtype=torch.int64)
    return torch.searchsorted(edges.cummax(0).values, rank, right=True) if len(edges) else torch.zeros_like(rank)


def random_partitions(name: str, positions: Tensor, numel: int, rates: Sequence[float], seed: int) -> Tensor:
    """Partition of each kept entry of a random selection, by a second stream of the seed that thins it.

    An entry kept at the target rate p is kept at the stricter rate r with probability (1 - r) / (1 - p), so that the
    kept entries of one seed are nested over rates.

    Args:
        name: canonical tensor name.
        positions: kept flat positions at the target rate, shape (kept,).
        numel: entries of the tensor.
        rates: from :func:`partition_rates`.
        seed: mask seed.
    """
    if len(rates) == 1:
        return torch.zeros(len(positions), dtype=torch.int64)
    words = uniform_words(name, seed, 0, numel, "partitions")[positions.numpy()]
    keep = 1 - exact_rate(rates[-1])
    edges = [int((1 - exact_rate(rate)) / keep * 2**32) for rate in rates[:-1]]
    return torch.from_numpy(np.searchsorted(np.array(edges, dtype=np.uint64), words.astype(np.uint64), side="right"))


def search_factors(
    cost: Callable[[Sequence[float]], float], partitions: int, step: float
) -> tuple[list[float], tuple[tuple[float, float], ...]]:
    """Both of DPPA's searches, the better of the two kept.

    Method 1 starts with partition 1 alone and moves its factor from 1 by ``step`` while the cost falls; then it adds
    partition 2 with factor 1 and moves only that, and so on. Method 2 has all partitions from the start with factor 1.

    Args:
        cost: factors, one for each partition (0: left out), to a number to be minimised.
        partitions: how many there are, at least 1.
        step: 0.1 amplifies; -0.1 goes down from 1, as on DARE's values.

    Returns:
        The best factors, and the last factor moved with the cost at every trial.
    """
    tried: dict[tuple[float, ...], float] = {}
    trail: list[tuple[float, float]] = []

    def cached_cost(factors: list[float], moved: float) -> float:
        key = tuple(factors)
        if key not in tried:
            tried[key] = float(cost(key))
            trail.append((moved, tried[key]))
        return tried[key]

    one_by_one = _climb(cached_cost, [0.0] * partitions, step)
    from_all = _climb(cached_cost, [1.0] * partitions, step)
    best = min((one_by_one, from_all), key=lambda factors: tried[tuple(factors)])
    return best, tuple(trail)


def _climb(cost: Callable[[list[float], float], float], factors: list[float], step: float) -> list[float]:
    """Move one factor after the other from 1 by ``step`` while the cost falls."""
    for index in range(len(factors)):
        factors[index] = 1.0
        best = cost(factors, 1.0)
        for count in range(1, _MOST_STEPS + 1):
            candidate = round(1.0 + count * step, 10)
            if candidate <= 0:
                break
            trial = [*factors[:index], candidate, *factors[index + 1 :]]
            value = cost(trial, candidate)
            if not value < best:
                break
            factors, best = trial, value
    return factors


def fit_partitions(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """A factor for each partition, upward from 1, or downward from DARE's on a random selection.

    Args:
        calibrator: pairs and objective.
        delta: kept entries with undivided float32 values, q = 1 or 1 - p.
    """
    rates = partition_rates(delta.pruning_rate)
    step = 0.1 if delta.q == 1 else -0.1

    def amplify(other: SparseDelta, partitions: Mapping[str, Tensor], factors: Sequence[float]) -> SparseDelta:
        weights = {name: amplified(torch.ones(len(number)), number, factors) for name, number in partitions.items()}
        return weighted(other, weights, factors=list(factors), partitions=rates)

    fitted_on = _partitions(calibrator, delta, rates)  # once for all candidates
    factors, tried = search_factors(
        lambda candidate: calibrator.cost(amplify(delta, fitted_on, candidate)), len(rates), step
    )
    return FoundRescaling(lambda other: amplify(other, _partitions(calibrator, other, rates), factors), tried)


def _partitions(calibrator: Calibrator, delta: SparseDelta, rates: Sequence[float]) -> dict[str, Tensor]:
    """Number of the partition of every kept entry, by tensor."""
    info, pairs = delta.info, {pair.name: pair for pair in calibrator.pairs}
    if info.seeded:
        return {
            name: random_partitions(name, kept.indices, pairs[name].numel, rates, info.seed)
            for name, kept in delta.tensors.items()
        }
    settings = get_method(info.method).selection_settings(info.settings)
    counts = dp_counts(calibrator.pairs, rates, **settings)
    by_name = {name: [of_rate[i] for of_rate in counts] for i, name in enumerate(pairs)}
    return {name: ranked_partitions(kept.values, by_name[name]) for name, kept in delta.tensors.items()}
