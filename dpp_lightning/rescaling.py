"""Rescalings: the number q that kept delta values are divided by. A kept entry becomes theta_0 + delta / q."""

from dpp_lightning.sampling import exact_rate


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
