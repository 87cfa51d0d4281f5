"""Rescalings: the number q that kept delta values are divided by. A kept entry becomes theta_0 + delta / q."""

from math import log
from typing import Literal

from torch import Tensor

from dpp_lightning.sampling.sampler import exact_rate


def no_rescaling(pruning_rate: float) -> float:
    """Random drop: q = 1, the kept values stay as they are."""
    exact_rate(pruning_rate)
    return 1.0


def keep_rate(pruning_rate: float) -> float:
    """DARE: q = 1 - p, which makes the pruned delta unbiased (1 - 0.99 is 0.01, computed as an exact decimal)."""
    return float(1 - exact_rate(pruning_rate))


def check_q(q: float, pruning_rate: float) -> float:
    """A q given by hand, as a float; candidates of DAREx-q lie in [1 - p, 1].

    Raises:
        ValueError: q is not a finite number above 0.
    """
    if not 0 < q < float("inf"):
        raise ValueError(
            f"q divides the kept delta values and must be a finite number above 0, usually in "
            f"[{keep_rate(pruning_rate):g}, 1] at pruning_rate={pruning_rate:g}; got {q!r}"
        )
    return float(q)


Rows = Literal["mean", "median", "trimmed"]
_TRIMMED = 0.1  # share of the rows left out at either end


def phi(pruning_rate: float) -> float:
    """Kearns and Saul's Phi(p) = (1 - 2p) / log((1 - p) / p), for p in (0, 1); 1/2 at p = 1/2."""
    p = float(exact_rate(pruning_rate))
    if abs(p - 0.5) < 1e-6:
        return 0.5
    return (1 - 2 * p) / log((1 - p) / p) if p else 0.0


def layer_q(s1: Tensor, s2: Tensor, pruning_rate: float, eta: float, *, rows: Rows = "mean") -> float:
    """The q of one layer that minimises the bound on its output change, in closed form (DAREx, per-layer **q**).

    The bound of output i, eta (1 - (1 - p)/q) |S1_i| + eta^2 Phi(p) S2_i / (4 q^2) + log(2/(1 - gamma)), all over eta,
    is quadratic in 1/q: q_i = clamp(eta Phi(p) S2_i / (2 (1 - p) |S1_i|), 1 - p, 1).

    Args:
        s1, s2: sums over inputs j of c_ij = delta_ij mean(x_j) and of c_ij squared, float64, shape (outputs,).
        pruning_rate: p in [0, 1).
        eta: >= 0; 0 gives 1 - p.
        rows: how the outputs' q_i become one number: their mean, median, or mean without a tenth at either end.

    Returns:
        q in [1 - p, 1]; 1 - p where no output changes.
    """
    keep = keep_rate(pruning_rate)
    live = s2 > 0
    s1, s2 = s1[live].abs(), s2[live]
    if not len(s2) or keep == 1:
        return keep
    q = (eta * phi(pruning_rate) * s2 / (2 * keep * s1)).nan_to_num(nan=keep).clamp(keep, 1.0)  # eta = 0, S1 = 0: 0/0
    if rows == "median":
        return float(q.median())
    if rows == "trimmed":
        cut = int(_TRIMMED * len(q))
        q = q.sort().values[cut : len(q) - cut]
    return float(q.mean())


def learned_q(coefficient: float, pruning_rate: float) -> float:
    """The q of one layer from its trained coefficient: |c| + 1 - p."""
    return abs(coefficient) + keep_rate(pruning_rate)
