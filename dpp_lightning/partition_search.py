"""DPA's search for the factors of the partitions: one coordinate after the other, upward while the score improves."""

from collections.abc import Callable, Sequence

_MOST_STEPS = 100  # of one partition


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

    def at(factors: list[float], moved: float) -> float:
        key = tuple(factors)
        if key not in tried:
            tried[key] = float(cost(key))
            trail.append((moved, tried[key]))
        return tried[key]

    one = _climb(at, [0.0] * partitions, step)
    all_present = _climb(at, [1.0] * partitions, step)
    best = min((one, all_present), key=lambda factors: tried[tuple(factors)])
    return best, tuple(trail)


def _climb(at: Callable[[list[float], float], float], factors: list[float], step: float) -> list[float]:
    for place in range(len(factors)):
        factors[place] = 1.0
        best = at(factors, 1.0)
        for count in range(1, _MOST_STEPS + 1):
            candidate = round(1.0 + count * step, 10)
            if candidate <= 0:
                break
            trial = [*factors[:place], candidate, *factors[place + 1 :]]
            value = at(trial, candidate)
            if not value < best:
                break
            factors, best = trial, value
    return factors
