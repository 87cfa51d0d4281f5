"""Structured random selection: whole input columns of the linear maps are dropped (DAREx, Table 9)."""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.methods.block_checks import check_pairs
from dpp_lightning.methods.kept_entries import KeptEntries
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.sampling.sampler import Int64Array, exact_rate, kept_positions, uniform_words
from dpp_lightning.tensors.flat_entries import gather_entries


def structured(
    pairs: Sequence[TensorPair], pruning_rate: float, seed: int, *, a: float | None = None, b: float | None = None
) -> Iterator[KeptEntries]:
    """Choose a share ``a`` of the input columns of each linear map at random, keep each entry there with probability b.

    p = 1 - a b. A kept value is delta (1 - p) / (a b) with the realised share of columns (at least one is chosen), so
    that q = 1 - p is unbiased. Tensors that are no linear map in a block keep each entry with probability 1 - p.

    The columns of a weight are those of the features whose inputs are known; else of its last dimension, as in a
    Linear (out, in). Experts in one tensor, (experts, out, in), share them.

    Args:
        pairs, pruning_rate, seed: as for every selection; the kept positions follow from seed, name and shape.
        a: share of columns, in (0, 1]; default (1 - p) / b.
        b: share of entries inside them, in (0, 1]; default (1 - p) / a, and min(1, 20 (1 - p)) where neither is given.

    Raises:
        ValueError: shares outside (0, 1], two that do not give p, or no pair is a linear map inside a block.
    """
    columns, inside = column_shares(pruning_rate, a, b)
    check_pairs("struct-dare and struct-darex-q go", pairs)
    keep = 1 - exact_rate(pruning_rate)
    for pair in pairs:
        if not pair.linear or keep == 1:
            yield KeptEntries(torch.from_numpy(kept_positions(pair.name, pair.numel, pruning_rate, seed)))
            continue
        matrix = (pair.numel // pair.shape[-1], pair.shape[-1])
        axis = 1 if pair.inputs is None or len(pair.shape) > 2 else pair.inputs.axis
        chosen = _columns(pair.name, matrix[axis], columns, seed)
        positions = torch.from_numpy(_inside(pair.name, matrix, axis, chosen, float(1 - inside), seed))
        weight = float(keep / (Fraction(len(chosen), matrix[axis]) * inside))
        yield KeptEntries(positions, _delta(pair, positions) * weight)


def verify_at(pruning_rate: float, settings: Mapping[str, Any]) -> None:
    """Refuse shares that do not give the rate.

    Raises:
        ValueError: as :func:`column_shares`.
    """
    column_shares(pruning_rate, settings.get("a"), settings.get("b"))


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


def _inside(name: str, matrix: tuple[int, int], axis: int, chosen: Int64Array, rate: float, seed: int) -> Int64Array:
    """Kept flat positions within the chosen columns, sorted."""
    rows, columns = matrix
    if axis == 1:
        drawn = kept_positions(name, rows * len(chosen), rate, seed)
        return drawn // len(chosen) * columns + chosen[drawn % len(chosen)]
    drawn = kept_positions(name, len(chosen) * columns, rate, seed)
    return chosen[drawn // columns] * columns + drawn % columns


def _delta(pair: TensorPair, positions: Tensor) -> Tensor:
    finetuned = gather_entries(pair.finetuned, positions).cpu().float()
    return finetuned - gather_entries(pair.base, positions).cpu().float()
