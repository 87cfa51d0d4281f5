"""Merge rules: the kept entries that several deltas have in one tensor to those of one delta. Work per kept entry.

Pure functions on :class:`WeightedEntries`: sorted distinct flat positions (int32 or int64) and the delta's values
there, both of shape (kept,). Sums are taken in float64, so that the order of the deltas does not show in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpp_lightning.methods.kept_entries import exact_count, true_positions


class WeightedEntries(NamedTuple):
    """One delta's kept entries of a tensor, with its weight there and the q that the values are divided by."""

    indices: Tensor
    values: Tensor
    weight: float
    q: float = 1.0

    def weighted(self) -> Tensor:
        """weight * value / q, float64, shape (kept,)."""
        return self.values.double() * (self.weight / self.q)


Rule = Callable[[Sequence[WeightedEntries], int, float], tuple[Tensor, Tensor]]
_SPARSE = 32  # below one kept entry in so many, sorting positions is faster than marking them


def weighted_sum(deltas: Sequence[WeightedEntries], numel: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Task arithmetic: scale * sum_k weight_k * delta_k at the entries that any delta keeps.

    Args:
        deltas: at least one.
        numel: entries of the tensor; all positions are below it.
        scale: multiplies the sum.

    Returns:
        (indices, values): sorted distinct int64 positions, float32 values, both of shape (kept,).
    """
    union = union_of([delta.indices for delta in deltas], numel)
    total = torch.zeros(union.size, dtype=torch.float64)
    for places, delta in zip(union.places, deltas, strict=True):
        total.index_add_(0, places, delta.weighted())
    return union.positions, (union.read(total) * scale).float()


def elected_mean(deltas: Sequence[WeightedEntries], numel: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """TIES: elect a sign for each entry, then take the mean of the deltas that agree with it.

    The sign is that of sum_k weight_k * delta_k; the value is scale * (sum over A of weight_k * delta_k) divided by the
    sum over A of the weights' magnitudes, with A the deltas whose weighted entry has that sign. Entries without one (a
    sum of exactly 0) are left out. Trimming is :func:`trimmed`.

    Args, returns: as :func:`weighted_sum`.
    """
    union = union_of([delta.indices for delta in deltas], numel)
    weighted = [delta.weighted() for delta in deltas]
    total = torch.zeros(union.size, dtype=torch.float64)
    for places, values in zip(union.places, weighted, strict=True):
        total.index_add_(0, places, values)
    sign, agreed, mass = total.sign(), torch.zeros_like(total), torch.zeros_like(total)
    for places, values, delta in zip(union.places, weighted, deltas, strict=True):
        of_sign = values.sign() == sign[places]
        agreed.index_add_(0, places, values * of_sign)
        mass.index_add_(0, places, of_sign.double() * abs(delta.weight))
    sign, agreed, mass = (union.read(sums) for sums in (sign, agreed, mass))
    kept = true_positions(sign != 0)
    return union.positions[kept], (scale * agreed[kept] / mass[kept]).float()


def trimmed(indices: Tensor, values: Tensor, numel: int, trim_rate: float) -> tuple[Tensor, Tensor]:
    """TIES' first step: of a tensor's entries only the numel - floor(trim_rate * numel) largest by magnitude.

    Entries that pruning has dropped count as zeros, so a delta with no more kept entries than that is left as it is. Of
    equal magnitudes the first are kept.

    Args:
        indices, values: the kept entries, shape (kept,).
        numel: entries of the whole tensor.
        trim_rate: fraction dropped, in [0, 1).
    """
    count = exact_count(numel, trim_rate)
    if len(indices) <= count:
        return indices, values
    order = values.abs().argsort(descending=True, stable=True)[:count].sort().values
    return indices[order], values[order]


class Union(NamedTuple):
    """The positions that several deltas have, and where their values are added up.

    Attributes:
        positions: sorted, distinct, int64.
        places: of each delta's positions in the sums, int64.
        size: of the sums: the number of positions, or where many of a tensor's entries are kept that of its entries.
        dense: the sums have a place for each of the tensor's entries.
    """

    positions: Tensor
    places: list[Tensor]
    size: int
    dense: bool

    def read(self, sums: Tensor) -> Tensor:
        """The sums at the positions, of shape (size,) to (positions,)."""
        return sums.index_select(0, self.positions) if self.dense else sums

    def ranks(self) -> list[Tensor]:
        """The index of each delta's positions among :attr:`positions`, int64."""
        return [torch.searchsorted(self.positions, places) for places in self.places] if self.dense else self.places


def union_of(indices: Sequence[Tensor], numel: int) -> Union:
    """The union of all positions.

    Args:
        indices: sorted distinct positions below ``numel``, one tensor for each delta.
        numel: where many of so many positions occur they are marked, which takes less time than sorting them.
    """
    first = indices[0]
    if all(torch.equal(first, other) for other in indices[1:]):
        return Union(first.long(), [torch.arange(len(first))] * len(indices), len(first), dense=False)
    wide = [positions.long() for positions in indices]
    if numel > _SPARSE * sum(map(len, indices)):
        union = torch.cat(wide).unique(sorted=True)
        return Union(union, [torch.searchsorted(union, positions) for positions in wide], len(union), dense=False)
    marks = torch.zeros(numel, dtype=torch.bool)
    for positions in wide:
        marks.index_fill_(0, positions, True)
    return Union(true_positions(marks), wide, numel, dense=True)


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge: its rule, and where it comes from.

    Attributes:
        rule: the deltas' entries of one tensor, the tensor's size and the scale to the merged entries.
        weight: of every delta where none is given.
        keeps_all: every entry that a delta keeps is kept.
        paper, url: for the card.
    """

    rule: Rule
    weight: float
    keeps_all: bool
    paper: str
    url: str


MERGES: dict[str, MergeMethod] = {
    "task-arithmetic": MergeMethod(
        weighted_sum, 0.4, True, "Editing Models with Task Arithmetic", "https://arxiv.org/abs/2212.04089"
    ),
    "ties": MergeMethod(elected_mean, 1.0, False, "TIES-Merging", "https://arxiv.org/abs/2306.01708"),
    "adamerging": MergeMethod(weighted_sum, 0.3, True, "AdaMerging", "https://arxiv.org/abs/2310.02575"),
}


def get_merge(name: str) -> MergeMethod:
    """The row of that name.

    Raises:
        ValueError: an unknown name; known ones are listed.
    """
    if name not in MERGES:
        raise ValueError(f"unknown merge method {name!r}; known are {', '.join(MERGES)}")
    return MERGES[name]
