"""The scalar search for the rescaling factor q (DAREx-q), and for eta of the q of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, log

from scipy.optimize import minimize_scalar

from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.rescaling import keep_rate

MAX_FORWARDS = 15  # of one search: the reference, q = 1 - p, and the minimiser's
_RTOL = 0.003  # of (1 - p) / q
_ETA_TOL = 0.01  # of log eta: one per cent of eta
_ETAS = (0.01, 100.0)


@dataclass(frozen=True)
class SearchResult:
    """The best q and every candidate that was tried, as (q, objective)."""

    q: float
    tried: tuple[tuple[float, float], ...]


def search_q(objective: Callable[[float], float], pruning_rate: float) -> SearchResult:
    """Minimise a smooth objective of q by a bounded scalar search over r = (1 - p) / q in [1 - p, 1].

    The output changes by a bias of 1 - r and a deviation proportional to r, so that its square is a parabola in r,
    which such a search finds in few steps. q = 1 - p itself is evaluated first (a minimiser never looks at its ends),
    so the result is never worse than DARE's on the objective. At most ``MAX_FORWARDS - 1`` evaluations, which leaves
    one for the reference output.

    Args:
        objective: q to a number to be minimised, such as the output change; what is not finite counts as the worst.
        pruning_rate: p in [0, 1); p = 0 has the single candidate q = 1.
    """
    lowest = keep_rate(pruning_rate)
    # over -r, so that where small q gives nothing finite the search goes to larger ones
    return _search(objective, lowest, lambda u: -lowest / u, (-1.0, -lowest) if lowest < 1 else None, _RTOL)


def search_eta(objective: Callable[[float], float], *, smooth: bool) -> SearchResult:
    """Minimise an objective of eta, the one number of the per-layer q, over 0 (DARE) and [0.01, 100].

    Args:
        objective: eta to a number to be minimised.
        smooth: by a bounded scalar search over log eta; otherwise on nine values, refined once beside the best.

    Returns:
        The best eta, as ``q`` of the result.
    """
    if smooth:
        return _search(objective, 0.0, exp, (log(_ETAS[0]), log(_ETAS[1])), _ETA_TOL)
    tried = {eta: float(objective(eta)) for eta in (0.0, *(10 ** (k / 2) for k in range(-4, 4)))}
    best = min(tried, key=lambda eta: (tried[eta], eta))
    for eta in (best / 10**0.25, best * 10**0.25) if best else ():
        tried[eta] = float(objective(eta))
    return SearchResult(min(tried, key=lambda eta: (tried[eta], eta)), tuple(tried.items()))


def _search(
    objective: Callable[[float], float],
    first: float,
    candidate: Callable[[float], float],
    bounds: tuple[float, float] | None,
    tolerance: float,
) -> SearchResult:
    """A first candidate of its own, then a bounded scalar search over u of ``candidate(u)``."""
    tried: list[tuple[float, float]] = []

    def cost(x: float) -> float:
        value = float(objective(x))
        tried.append((x, value if isfinite(value) else float("inf")))
        return min(tried[-1][1], 1e300)

    cost(first)
    if bounds is not None:
        options = {"maxiter": MAX_FORWARDS - 2, "xatol": tolerance}
        minimize_scalar(lambda u: cost(float(candidate(u))), bounds=bounds, method="bounded", options=options)
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
