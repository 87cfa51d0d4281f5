"""Theory and choice: the bounds of DARE the Extreme's Theorem 3.1, and its Fig. 4 on which method to take.

Random drop with rescaling 1/(1 - p) changes the output of row i by h_i = sum_j c_ij (1 - b_j / (1 - p)), where
c_ij = delta_ij x_j and the b_j are independent and 1 with probability 1 - p. With probability gamma at least,
|h_i| <= Psi(p) sqrt(log(2 / (1 - gamma))) ||c_i||, and ||c_i|| = sqrt(n (mean^2 + variance)) over the n inputs j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, log, log1p, sqrt

from dpp_lightning.methods.rescaling import keep_rate, phi

LARGE_DELTA = 0.01  # mean |delta|: 4e-4 to 7.3e-4 of three models that DARE suits, 0.017 of the one it fails (Table 8)


def hoeffding(pruning_rate: float) -> float:
    """Hoeffding's factor 1 / ((1 - p) sqrt 2), a guarantee (Fig. 10).

    Args:
        pruning_rate: p in [0, 1).

    Raises:
        ValueError: a rate outside.
    """
    return 1 / (keep_rate(pruning_rate) * sqrt(2))


def kearns_saul(pruning_rate: float) -> float:
    """Kearns and Saul's factor sqrt(Phi(p)) / (1 - p), a guarantee and nowhere above Hoeffding's (Fig. 10, Eq. 8).

    Args:
        pruning_rate: p in [0, 1); the limit at 0 is 0.

    Raises:
        ValueError: a rate outside.
    """
    return sqrt(phi(pruning_rate)) / keep_rate(pruning_rate)


def berend_kontorovich(pruning_rate: float) -> float:
    """Berend and Kontorovich's factor sqrt(2p / (1 - p)) (Fig. 10), the theorem's Psi(p) for p >= 1/2.

    The scaling that the central limit theorem gives, good where n (1 - p) >> log(2 / (1 - gamma)). No guarantee: it
    rests on a one-sided lemma, and at n = 64, p = 0.999 simulation exceeds it in 6 % of the draws where 5 % may.

    Args:
        pruning_rate: p in [1/2, 1).

    Raises:
        ValueError: a rate outside.
    """
    keep = keep_rate(pruning_rate)
    if keep > 0.5:
        raise ValueError(
            f"Berend and Kontorovich's factor holds for a pruning rate in [0.5, 1), got {pruning_rate!r}; "
            "below it kearns_saul is the factor of Theorem 3.1"
        )
    return sqrt(2 * (1 - keep) / keep)


def bound(
    pruning_rate: float,
    mean: float,
    variance: float,
    features: int,
    gamma: float = 0.95,
    factor: Callable[[float], float] = kearns_saul,
) -> float:
    """Theorem 3.1: what the output change of a row stays below with probability gamma.

    Args:
        pruning_rate: p in [0, 1).
        mean, variance: of c_ij over the inputs j (dividing by n, not n - 1).
        features: n, the number of inputs.
        gamma: in (0, 1).
        factor: :func:`hoeffding`, :func:`kearns_saul` or :func:`berend_kontorovich`, which is no guarantee.

    Raises:
        ValueError: a value outside its range.
    """
    if not (isfinite(mean) and 0 <= variance < float("inf") and features >= 0):
        raise ValueError(
            f"expected a finite mean, a variance >= 0 and features >= 0, got {mean!r}, {variance!r}, {features!r}"
        )
    return factor(pruning_rate) * confidence(gamma) * sqrt(features * (mean**2 + variance))


def confidence(gamma: float) -> float:
    """sqrt(log(2 / (1 - gamma))).

    Raises:
        ValueError: gamma outside (0, 1).
    """
    if not 0 < gamma < 1:
        raise ValueError(f"gamma is a probability inside (0, 1), usually 0.95; got {gamma!r}")
    return sqrt(log(2) - log1p(-gamma))


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        method: a name of ``METHODS``.
        reason: one sentence with the number it rests on.
        objective: what q is searched by, ``metric`` (labels) or ``output change``; None where there is no q.
        optimizer: what to fine-tune again with beforehand, or None.
    """

    method: str
    reason: str
    objective: str | None = None
    optimizer: str | None = None


def recommend(
    mean_delta: float, *, labels: bool = False, can_retrain: bool = False, inputs: bool = True
) -> Recommendation:
    """The method that Fig. 4 arrives at.

    Args:
        mean_delta: mean |delta| over the model, >= 0.
        labels: a labelled set is at hand, apart from what is scored.
        can_retrain: the model may be fine-tuned again, with AdamR.
        inputs: calibration inputs are at hand, which WANDA needs.

    Raises:
        ValueError: a mean that is negative or not finite.
    """
    if not 0 <= mean_delta < float("inf"):
        raise ValueError(f"mean |delta| must be a number >= 0, got {mean_delta!r}; are the weights finite?")
    size = f"mean |delta| is {mean_delta:.2g}, {'at least' if mean_delta >= LARGE_DELTA else 'below'} {LARGE_DELTA:g}"
    objective, data = ("metric", "on the labels") if labels else ("output change", "on the output change, no labels")
    if can_retrain:
        reason = f"{size}; fine-tuning again with AdamR-L2 makes it smaller, then q is searched {data}"
        return Recommendation("darex-q", reason, objective, "AdamR-L2")
    if mean_delta < LARGE_DELTA:
        return Recommendation("darex-q", f"{size}: random drop suits small deltas; q is searched {data}", objective)
    large = f"{size}: random drop fails on large deltas"
    if labels:
        return Recommendation("dppa", f"{large}, and labels let DPPA search its amplification")
    if inputs:
        return Recommendation("wanda", f"{large}, the largest |delta| times input stay")
    return Recommendation("magnitude", f"{large}, and without inputs (WANDA's) the largest |delta| stay")


def recommend_few_bytes(*, texts: bool) -> Recommendation:
    """What keeps most of the score in few bytes, by what was measured (``tests/benchmarks/README.md``).

    Args:
        texts: some hundred examples without labels are at hand.
    """
    if texts:
        reason = "with --max_bytes 50kB it lost 1.1 points or less of five encoders' scores (22.7 M parameters)"
        return Recommendation("auto", f"{reason}; it trains every form and compares them on held-out examples")
    reason = "with --settings rank=4 rest=0.97 it lost 0.7 points or less of five encoders' scores (22.7 M parameters)"
    return Recommendation("lowrank", f"{reason} in 137 kB, without data")
