"""The scalar search for the rescaling factor q (DAREx-q), and for eta of the q of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, isfinite, log

from scipy.optimize import minimize_scalar

from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate

MAX_FORWARDS = 15  # of one search: the reference, and at most 14 candidates; mostly 4 to 6
_STRIDES = (0.0, 0.2, 0.5, 1.0)  # of the range of r = (1 - p) / q, from r = 1 on, until the cost rises clearly:
_RISE = 1.1  # by this factor; where it is flatter than that it may have several lows
_WIDE, _LOPSIDED = 0.3, 2.5  # a neighbour this far off, and as many times as far as the other one, is halved first
_APART = 0.003  # of the range: candidates that are nearer than this are one
_NEAR = (0.06, 0.15)  # of the range: the ends r = 1 and q = 1 are best only if the cost rises within this of them
_GAIN = 0.002  # of the square of the cost: what a further candidate must promise
_ETA_TOL = 0.01  # of log eta: one per cent of eta
_ETAS = (0.01, 100.0)


@dataclass(frozen=True)
class SearchResult:
    """The best q and every candidate that was tried, as (q, objective)."""

    q: float
    tried: tuple[tuple[float, float], ...]


def search_q(objective: Callable[[float], float], pruning_rate: float) -> SearchResult:
    """Minimise a smooth objective of q by parabolas over r = (1 - p) / q in [1 - p, 1].

    The output changes by a bias of 1 - r and a deviation proportional to r: its square is nearly a parabola in r. From
    q = 1 - p on, which is evaluated first so that the result is never worse than DARE's on the objective, r falls until
    the cost rises clearly; then the lowest point of the parabola through the best candidate and its neighbours is
    evaluated, as long as it promises a gain of a thousandth of the cost. There are at most ``MAX_FORWARDS - 1``
    evaluations, which leaves one for the reference output.

    Args:
        objective: q to a number to be minimised, such as the output change; what is not finite counts as the worst.
        pruning_rate: p in [0, 1); p = 0 has the single candidate q = 1.
    """
    lowest = keep_rate(pruning_rate)
    tried: dict[float, tuple[float, float]] = {}  # share of the range of r, from r = 1 on, to q and the cost

    def cost(share: float) -> float:
        if share not in tried:
            q = 1.0 if share == 1 else lowest / (1 - share * (1 - lowest))
            value = float(objective(q))
            tried[share] = q, value if isfinite(value) else inf
        return tried[share][1]

    cost(0.0)
    if lowest < 1:
        best = inf
        for share in _STRIDES:
            if cost(share) > _RISE * best:
                break
            best = min(best, cost(share))
        while len(tried) < MAX_FORWARDS - 1:
            following = _next_share({share: value for share, (_, value) in tried.items()})
            if following is None:
                break
            cost(following)
    found, best = min(tried.values(), key=lambda pair: pair[1])
    if best == inf:
        warnings.warn(
            f"the objective is not finite for any q, so that q = {found:g} was not found by it: look for outputs that "
            "are not finite",
            stacklevel=2,
        )
    return SearchResult(found, tuple(tried.values()))


def _next_share(costs: dict[float, float]) -> float | None:
    """Where to look next between 0 and 1, having seen the costs at some places; None where nothing is to be gained."""
    shares = sorted(costs)
    best = min(shares, key=lambda x: (costs[x], x))
    i = shares.index(best)
    near = shares[max(i - 1, 0) : i + 2]
    if any(costs[x] == inf for x in near):  # halve the way to what is not finite
        far = next(x for x in near if costs[x] == inf)
        return (best + far) / 2 if abs(best - far) > _NEAR[0] and costs[best] < inf else None
    if len(near) == 2:
        if abs(near[1] - near[0]) > _NEAR[i > 0]:
            return sum(near) / 2
        near = shares[:3] if i == 0 else shares[-3:]
        if costs[near[0]] == inf or costs[near[2]] == inf:
            return None
    narrow, wide = sorted((near[1] - near[0], near[2] - near[1]))
    if best == near[1] and wide > max(_WIDE, _LOPSIDED * narrow):  # what lies far off says little of the lowest point
        return best + wide / 2 if near[2] - near[1] == wide else best - wide / 2
    low, gain = _lowest_point([(x, costs[x] ** 2) for x in near], costs[best] ** 2)
    low = min(max(low, 0.0), 1.0)
    if gain <= _GAIN * costs[best] ** 2 or min(abs(low - x) for x in shares) < _APART:
        return None
    return low


def _lowest_point(points: list[tuple[float, float]], best: float) -> tuple[float, float]:
    """Where the parabola through three points is lowest, and how far below ``best``; no gain where it has no lowest."""
    (a, f), (b, g), (c, h) = points
    left, right = (g - f) / (b - a), (h - g) / (c - b)
    curvature = (right - left) / (c - a)
    if curvature <= 0:
        return b, 0.0
    low = (a + b) / 2 - left / (2 * curvature)
    return low, best - (f + (low - a) * left + (low - a) * (low - b) * curvature)


def search_eta(objective: Callable[[float], float], *, smooth: bool) -> SearchResult:
    """Minimise an objective of eta, the one number of the per-layer q, over 0 (DARE) and [0.01, 100].

    Args:
        objective: eta to a number to be minimised.
        smooth: by a bounded scalar search over log eta; otherwise on nine values, refined once beside the best.

    Returns:
        The best eta, as ``q`` of the result.
    """
    if smooth:
        return _search_eta(objective)
    tried = {eta: float(objective(eta)) for eta in (0.0, *(10 ** (k / 2) for k in range(-4, 4)))}
    best = min(tried, key=lambda eta: (tried[eta], eta))
    for eta in (best / 10**0.25, best * 10**0.25) if best else ():
        tried[eta] = float(objective(eta))
    return SearchResult(min(tried, key=lambda eta: (tried[eta], eta)), tuple(tried.items()))


def _search_eta(objective: Callable[[float], float]) -> SearchResult:
    """0, then a bounded scalar search over log eta."""
    tried: list[tuple[float, float]] = []

    def cost(eta: float) -> float:
        value = float(objective(eta))
        tried.append((eta, value if isfinite(value) else inf))
        return min(tried[-1][1], 1e300)

    cost(0.0)
    options = {"maxiter": MAX_FORWARDS - 2, "xatol": _ETA_TOL}
    bounds = (log(_ETAS[0]), log(_ETAS[1]))
    minimize_scalar(lambda u: cost(exp(u)), bounds=bounds, method="bounded", options=options)
    return SearchResult(min(tried, key=lambda pair: pair[1])[0], tuple(tried))


def search_q_by_score(score: Callable[[float], float], pruning_rate: float, *, higher_is_better: bool) -> SearchResult:
    """Optimise a step function of q, such as an accuracy, on a short grid in log q that is then refined once.

    Nine values (1 - p)^(1 - (k/8)^2), close together near 1 - p, where the best q mostly lies; then the two halfway
    points beside the best. Among equals the q nearest to 1 - p wins.

    Args:
        score: q to the metric on the whole calibration set.
        pruning_rate: p in [0, 1).
        higher_is_better: whether the metric is to be maximised.
    """
    lowest, sign = keep_rate(pruning_rate), -1.0 if higher_is_better else 1.0
    if lowest == 1:
        return SearchResult(1.0, ((1.0, float(score(1.0))),))
    tried: dict[float, float] = {}

    def cost(q: float) -> float:
        if q not in tried:
            tried[q] = float(score(q))
        return sign * tried[q] if isfinite(tried[q]) else float("inf")

    grid = [lowest, *(exp(log(lowest) * (1 - (k / 8) ** 2)) for k in range(1, 8)), 1.0]
    best = min(range(len(grid)), key=lambda i: (cost(grid[i]), i))
    near = [grid[i] for i in (best - 1, best + 1) if 0 <= i < len(grid)]
    for q in near:
        cost((q * grid[best]) ** 0.5)
    return SearchResult(min(tried, key=lambda q: (cost(q), q)), tuple(tried.items()))


def q_grid(pruning_rate: float, points: int) -> list[float]:
    """``points`` values of q from 1 - p to 1, evenly spaced in log q; the ends exactly."""
    lowest = keep_rate(pruning_rate)
    inner = [exp(log(lowest) * (1 - i / (points - 1))) for i in range(1, points - 1)]
    return [lowest, *inner, 1.0] if lowest < 1 else [1.0]


def fit_one_q(calibrator: Calibrator, delta: SparseDelta) -> FoundRescaling:
    """One q for the whole model (DAREx-q, global q): the fit of ``darex-q``, ``struct-darex-q`` and ``importance``."""

    def cost(q: float) -> float:
        return calibrator.cost(delta.rescaled(q))

    if calibrator.objective.smooth:
        result = search_q(cost, delta.pruning_rate)
    else:
        result = search_q_by_score(cost, delta.pruning_rate, higher_is_better=False)
    return FoundRescaling(lambda other: other.rescaled(result.q), result.tried)
