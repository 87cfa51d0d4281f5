"""OWL and DP: magnitude pruning whose rate differs from block to block, by what the delta has of large entries."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dpp_lightning.methods.block_checks import check_pairs
from dpp_lightning.methods.kept_entries import KeptEntries, exact_count
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.methods.top_scores import ranked
from dpp_lightning.sampling.sampler import exact_rate

OwlVariant = Literal["dppa", "original"]
DpVariant = Literal["paper", "released"]

_RELEASED_BLOCK, _RELEASED_LINEAR, _RELEASED_LAMBDA = 3.0, 5.0, 0.08


def owl(
    pairs: Sequence[TensorPair],
    pruning_rate: float,
    seed: int,
    *,
    variant: OwlVariant = "dppa",
    fluctuation: float = 0.08,
    outlier_factor: float = 5.0,
) -> Iterator[KeptEntries]:
    """Magnitude with a rate for each block: keep_b = (1 - p) + lambda (D_b - mean D) / max |D - mean D|.

    D_b is the share of the block's entries (of its linear maps) above M times their mean. The keep rates are then
    scaled so that the whole delta keeps its (1 - p) n. Tensors outside the blocks use p. Where all blocks have one D,
    and so where there is a single block, nothing swings and every tensor keeps the same share; a single block is warned
    of.

    Args:
        pairs, pruning_rate: as for every selection.
        seed: not used.
        variant: ``dppa`` as DPPA uses it; ``original`` has 2 lambda (D - min) / (max - min), recentred.
        fluctuation: lambda >= 0; at most p and 1 - p count.
        outlier_factor: M > 0.

    Raises:
        ValueError: a setting outside its range, or no pair is a linear map inside a block.
    """
    _check(fluctuation=fluctuation, outlier_factor=outlier_factor)
    check_pairs("owl goes", pairs)
    blocks = _blocks(pairs)
    if len(blocks) == 1:
        warnings.warn(
            f"owl swings the rate between blocks, and this model has a single one ({next(iter(blocks))}): every tensor "
            "keeps the same share. If the model's blocks are others, say where (blocks=, --blocks)",
            stacklevel=2,
        )
    share = [_large(group, [outlier_factor])[0].share for group in blocks.values()]
    swing = _within(fluctuation, pruning_rate)
    moved = dict(zip(blocks, _swing(share, swing, recentred=variant == "original"), strict=True))
    keep = [1 - pruning_rate + moved.get(pair.block or "", 0.0) for pair in pairs]
    yield from ranked(pairs, budgeted_counts(keep, [p.numel for p in pairs], pruning_rate))


def dp(
    pairs: Sequence[TensorPair],
    pruning_rate: float,
    seed: int,
    *,
    variant: DpVariant = "paper",
    fluctuation: float = 0.08,
    outlier_factor: float = 5.0,
) -> Iterator[KeptEntries]:
    """Magnitude with a rate for each linear map, p - r_b - u_l (DPPA, Section 3.2); see :func:`dp_counts`.

    Raises:
        ValueError: a setting outside its range, or no pair is a linear map inside a block.
    """
    check_pairs("dp and dppa go", pairs)
    yield from ranked(pairs, dp_counts(pairs, [pruning_rate], variant, fluctuation, outlier_factor)[0])


def dp_counts(
    pairs: Sequence[TensorPair],
    pruning_rates: Sequence[float],
    variant: DpVariant = "paper",
    fluctuation: float = 0.08,
    outlier_factor: float = 5.0,
) -> list[list[int]]:
    """How many entries DP keeps of each tensor, for several rates.

    The significance S of a set of deltas is the sum of |delta| above N times their mean. Blocks:
    r_b = lambda (S_b - mean S) / max |S - mean S|. Linear maps, all of the model together: s_l = S_l / mean S,
    t_l = s_l - sum n_l s_l / sum n_l, u_l = lambda t_l / max |t|. Linear l keeps 1 - p + r_b + u_l, clamped to [0, 1]
    and scaled so that the whole delta keeps its (1 - p) n. Of a single block, or of blocks that are alike, r_b is 0 and
    only the linear maps differ.

    Args:
        pairs: the pruned tensors; those outside the blocks use p, those in a block that are no linear map p - r_b.
        pruning_rates: each in [0, 1).
        variant: ``released`` is the published code: S is a share of entries, N is 3 for blocks and 5 for linears,
            lambda 0.08, and nothing is scaled, so that more than (1 - p) n is kept at high rates.
        fluctuation: lambda >= 0; at most p and 1 - p count.
        outlier_factor: N > 0.

    Raises:
        ValueError: a setting outside its range.
    """
    _check(fluctuation=fluctuation, outlier_factor=outlier_factor)
    released = variant == "released"
    factors = [_RELEASED_BLOCK, _RELEASED_LINEAR] if released else [outlier_factor] * 2
    blocks = _blocks(pairs)
    whole = [_large(group, factors)[0] for group in blocks.values()]
    block_swing = dict(zip(blocks, _swing([w.share if released else w.total for w in whole], 1.0), strict=True))
    linears = [pair for group in blocks.values() for pair in group]
    single = [_large([pair], factors)[1] for pair in linears]
    relative = _relative([w.share if released else w.total for w in single], [pair.numel for pair in linears])
    linear_swing = dict(zip([pair.name for pair in linears], relative, strict=True))
    counts = []
    for rate in pruning_rates:
        swing = _RELEASED_LAMBDA if released else _within(fluctuation, rate)
        moved = [block_swing.get(p.block or "", 0.0) + linear_swing.get(p.name, 0.0) for p in pairs]
        keep, sizes = [1 - rate + swing * m for m in moved], [pair.numel for pair in pairs]
        if released:
            counts.append([round(min(max(k, 0.0), 1.0) * n) for k, n in zip(keep, sizes, strict=True)])
        else:
            counts.append(budgeted_counts(keep, sizes, rate))
    return counts


def budgeted_counts(keep: Sequence[float], sizes: Sequence[int], pruning_rate: float) -> list[int]:
    """Keep rates scaled and clamped to [0, 1] so that exactly n - floor(p n) entries of n = sum of sizes are kept.

    Args:
        keep: the wanted keep rate of each tensor.
        sizes: entries of each tensor.
        pruning_rate: p in [0, 1).
    """
    total = exact_count(sum(sizes), pruning_rate)
    rates, full = [max(k, 0.0) for k in keep], set[int]()
    while True:  # what does not fit into a tensor goes to the others
        left = [i for i in range(len(sizes)) if i not in full]
        rest, weight = total - sum(sizes[i] for i in full), sum(rates[i] * sizes[i] for i in left)
        if rest and left and not weight:  # all that is left is to keep nothing: evenly then
            rates = [1.0 if i in left else r for i, r in enumerate(rates)]
            continue
        scale = rest / weight if weight else 0.0
        over = {i for i in left if rates[i] * scale > 1}
        if not over:
            break
        full |= over
    wanted = [float(n) if i in full else r * scale * n for i, (r, n) in enumerate(zip(rates, sizes, strict=True))]
    counts = [int(w) for w in wanted]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - wanted[i], i))
    for i in sorted(order, key=lambda i: counts[i] >= sizes[i]):  # the largest remainders are rounded up
        if sum(counts) >= total:
            break
        counts[i] += counts[i] < sizes[i]
    return counts


@dataclass(frozen=True)
class _Large:
    """What lies above N times the mean: the share of entries, and the sum of |delta|."""

    share: float
    total: float


def _large(group: Sequence[TensorPair], factors: Sequence[float]) -> list[_Large]:
    """For each N, what the tensors together have above N times their common mean; read twice."""
    numel = sum(pair.numel for pair in group)
    mean = sum(float(score.sum(dtype=torch.float64)) for pair in group for _, _, score in pair.scores()) / max(numel, 1)
    shares, totals = [0] * len(factors), [0.0] * len(factors)
    for pair in group:
        for _, _, score in pair.scores():
            for k, factor in enumerate(factors):
                big = score[score > factor * mean]
                shares[k] += len(big)
                totals[k] += float(big.sum(dtype=torch.float64))
    return [_Large(n / max(numel, 1), total) for n, total in zip(shares, totals, strict=True)]


def _blocks(pairs: Sequence[TensorPair]) -> dict[str, list[TensorPair]]:
    """The linear maps of each block."""
    blocks: dict[str, list[TensorPair]] = {}
    for pair in pairs:
        if pair.linear and pair.block is not None:
            blocks.setdefault(pair.block, []).append(pair)
    return blocks


def _swing(values: Sequence[float], width: float, *, recentred: bool = False) -> list[float]:
    """width (v - mean) / max |v - mean|, or 2 width (v - min) / (max - min) less its mean; 0 where all are alike."""
    if not values:
        return []
    if recentred:
        low, span = min(values), max(values) - min(values)
        moved = [2 * width * (v - low) / span if span else 0.0 for v in values]
        return [m - sum(moved) / len(moved) for m in moved]
    mean = sum(values) / len(values)
    most = max(abs(v - mean) for v in values)
    return [width * (v - mean) / most if most else 0.0 for v in values]


def _relative(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """t_l / max |t|, with t_l = s_l - (weighted mean of s) and s_l = S_l / mean S."""
    if not values:
        return []
    mean = sum(values) / len(values)
    scaled = [v / mean if mean else 0.0 for v in values]
    centre = sum(n * s for n, s in zip(sizes, scaled, strict=True)) / max(sum(sizes), 1)
    most = max(abs(s - centre) for s in scaled)
    return [(s - centre) / most if most else 0.0 for s in scaled]


def _within(fluctuation: float, pruning_rate: float) -> float:
    return min(fluctuation, pruning_rate, float(1 - exact_rate(pruning_rate)))


def verify(settings: Mapping[str, Any]) -> None:
    """Refuse settings of OWL and DP that are out of their range.

    Raises:
        ValueError: a fluctuation below 0, an outlier factor that is not above 0, or one that is not finite.
    """
    _check(**{name: settings[name] for name in ("fluctuation", "outlier_factor") if name in settings})


def _check(*, fluctuation: float = 0.08, outlier_factor: float = 5.0) -> None:
    if not 0 <= fluctuation < float("inf"):
        raise ValueError(f"fluctuation (lambda) must be a number >= 0, usually 0.08; got {fluctuation!r}")
    if not 0 < outlier_factor < float("inf"):
        raise ValueError(f"outlier_factor (M of OWL, N of DP) must be a number > 0, usually 5; got {outlier_factor!r}")
