"""Calibration: what pruning does to a layer's output, and the scalar search for the rescaling factor q."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, isfinite, log
from typing import Any

from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from dpp_lightning.rescaling import keep_rate

MAX_FORWARDS = 15  # of one search: the reference, q = 1 - p, and the minimiser's
_RTOL = 0.003  # of (1 - p) / q
_ETA_TOL = 0.01  # of log eta: one per cent of eta
_ETAS = (0.01, 100.0)
_TOP = 5  # logits that count in the squared error


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


def output_change(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Mean absolute difference over all entries of two sets of outputs (DAREx Algorithm 2, objective e).

    Args:
        reference, outputs: tensors of equal shapes, in the same order.

    Raises:
        ValueError: no outputs, or shapes that differ.
    """
    if not reference or [t.shape for t in reference] != [t.shape for t in outputs]:
        raise ValueError(
            f"outputs of shapes {[tuple(t.shape) for t in outputs]} cannot be compared with the fine-tuned model's "
            f"{[tuple(t.shape) for t in reference]}; the calibration batch must be the same for both"
        )
    total = sum((a.double() - b.double()).abs().sum().item() for a, b in zip(reference, outputs, strict=True))
    return float(total) / max(sum(t.numel() for t in reference), 1)


def top_logits_error(reference: Tensor, outputs: Tensor) -> Tensor:
    """Mean squared difference over the fine-tuned model's top-min(5, classes) logits (released code for decoders).

    Args:
        reference: the fine-tuned model's logits, (..., classes).
        outputs: the pruned model's, of the same shape; may carry gradients.
    """
    top = reference.topk(min(_TOP, reference.shape[-1]), dim=-1)
    return (outputs.gather(-1, top.indices) - top.values).square().mean()


@contextmanager
def recorded_outputs(module: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    """Collect what a submodule returns in every forward inside the block, detached.

    Args:
        module: the model.
        layer: name as in ``named_modules()``; None takes the last one that directly holds parameters.

    Raises:
        ValueError: no such submodule.
    """
    outputs: list[Tensor] = []
    target = dict(module.named_modules())[resolve_layer(module, layer)]
    handle = target.register_forward_hook(lambda _m, _i, out: outputs.append(_first_tensor(out).detach().clone()))
    try:
        yield outputs
    finally:
        handle.remove()


def resolve_layer(module: nn.Module, layer: str | None) -> str:
    """The name of the submodule whose output is compared; default the last with parameters of its own.

    Raises:
        ValueError: no such submodule, with the nearest names.
    """
    names = [name for name, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None]
    if layer is None:
        if not names:
            raise ValueError(f"{type(module).__name__} has no submodule with parameters")
        return names[-1]
    if layer not in dict(module.named_modules()):
        raise ValueError(f"output_layer {layer!r} is no submodule; the last ones with parameters are {names[-4:]}")
    return layer


def _first_tensor(output: Any) -> Tensor:
    """The tensor of an output that may be a tensor, a tuple or a mapping (a transformers ModelOutput)."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    for item in items:
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise ValueError(f"the output layer returned {type(output).__name__} without a floating-point tensor in it")
