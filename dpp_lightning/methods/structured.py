"""Structured random selection: whole input columns of the linear maps are dropped (DAREx, Table 9)."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.methods.kept_entries import KeptEntries
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.sampling.philox import Int64Array
from dpp_lightning.sampling.sampler import exact_rate, kept_positions, uniform_words
from dpp_lightning.tensors.blocks import is_linear_map
from dpp_lightning.tensors.flat_entries import gather_entries


def structured(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, a: float | None = None, b: float | None = None
) -> Iterator[KeptEntries]:
    """Choose a share ``a`` of the input columns of each linear map at random, keep each entry there with probability b.

    p = 1 - a b. A kept value is delta (1 - p) / (a b) with the realised share of columns (at least one is chosen), so
    that q = 1 - p is unbiased. Tensors that are no linear map of a numbered block keep each entry with probability
    1 - p.

    Args:
        pairs, pruning_rate, seed: as for every selection; the kept positions follow from seed, name and shape.
        a: share of columns, in (0, 1]; default (1 - p) / b.
        b: share of entries inside them, in (0, 1]; default (1 - p) / a, and min(1, 20 (1 - p)) where neither is given.

    Raises:
        ValueError: shares outside (0, 1], or two that do not give p.
    """
    columns, inside = column_shares(pruning_rate, a, b)
    keep = 1 - exact_rate(pruning_rate)
    for pair in pairs:
        if not is_linear_map(pair.name, pair.shape) or keep == 1:
            yield KeptEntries(torch.from_numpy(kept_positions(pair.name, pair.numel, pruning_rate, seed)))
            continue
        axis = 1 if pair.inputs is None else pair.inputs.axis
        features = pair.shape[axis]
        chosen = _columns(pair.name, features, columns, seed)
        positions = torch.from_numpy(_inside(pair, axis, chosen, float(1 - inside), seed))
        weight = float(keep / (Fraction(len(chosen), features) * inside))
        yield KeptEntries(positions, _delta(pair, positions) * weight)


def column_shares(pruning_rate: float, a: float | None, b: float | None) -> tuple[Fraction, Fraction]:
    """(a, b) with a b = 1 - p, exactly where one of them is not given.

    Raises:
        ValueError: shares outside (0, 1], or two that do not give p.
    """
    keep = 1 - exact_rate(pruning_rate)
    for name, share in (("a", a), ("b", b)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name} is a share of columns or entries in (0, 1], got {share!r}")
    if a is not None and b is not None:
        columns, inside = Fraction(str(a)), Fraction(str(b))
        if abs(float(columns * inside - keep)) > 1e-9:
            raise ValueError(
                f"a b must be 1 - pruning_rate = {float(keep):g}, got a = {a:g} and b = {b:g}; give one of them only"
            )
        return columns, inside
    if a is not None:
        columns = Fraction(str(a))
        inside = keep / columns
    else:
        inside = min(Fraction(1), 20 * keep) if b is None else Fraction(str(b))
        columns = keep / inside
    if max(columns, inside) > 1:
        raise ValueError(
            f"the share given is below 1 - pruning_rate = {float(keep):g}, so that the other would exceed 1"
        )
    return columns, inside


def _columns(name: str, features: int, share: Fraction, seed: int) -> Int64Array:
    """Sorted numbers of the chosen columns: those with the smallest words, at least one."""
    count = max(round(share * features), 1)
    words = uniform_words(name, seed, 0, features, "columns")
    return np.sort(np.argsort(words, kind="stable")[:count])


def _inside(pair: TensorPair, axis: int, chosen: Int64Array, rate: float, seed: int) -> Int64Array:
    """Kept flat positions within the chosen columns, sorted."""
    rows, columns = pair.shape
    if axis == 1:
        drawn = kept_positions(pair.name, rows * len(chosen), rate, seed)
        return drawn // len(chosen) * columns + chosen[drawn % len(chosen)]
    drawn = kept_positions(pair.name, len(chosen) * columns, rate, seed)
    return chosen[drawn // columns] * columns + drawn % columns


def _delta(pair: TensorPair, positions: Tensor) -> Tensor:
    finetuned = gather_entries(pair.finetuned, positions).cpu().float()
    return finetuned - gather_entries(pair.base, positions).cpu().float()
