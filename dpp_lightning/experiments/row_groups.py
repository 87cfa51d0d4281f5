"""The rows of an experiment's grid, and those of them that share one search of what their method fits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dpp_lightning.methods.registry import get_method

Row = tuple[str, float, int]


@dataclass(frozen=True)
class RowGroup:
    """Rows that are made by one process, one after the other.

    Attributes:
        rows: (method, rate, seed) of each, in the grid's order. What the method fits is found on the first one's mask
            and serves all of them; a row that shares nothing is a group of its own.
    """

    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The group in a message, such as ``dare 0.99 seed 1``; without the seed where it is of all seeds."""
        method, rate, seed = self.rows[0]
        shares = shares_search(method) or not get_method(method).random
        return f"{method} {rate_text(rate)}" + ("" if shares else f" seed {seed}")

    def is_in(self, done: Collection[Row]) -> bool:
        """Whether all of its rows are among those."""
        return all(row in done for row in self.rows)


def grid(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Row]:
    """Every (method, rate, seed) of a run, in its order; the first seed alone for a method that draws nothing."""
    return [row for group in row_groups(methods, rates, seeds) for row in group.rows]


def row_groups(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[RowGroup]:
    """The rows of a grid in its order, as groups: all seeds of a method and rate where they share a search, else one
    row each."""
    groups = []
    for method in methods:
        drawn = seeds if get_method(method).random else seeds[:1]
        for rate in rates:
            rows = tuple((method, float(rate), seed) for seed in drawn)
            groups += [RowGroup(rows)] if shares_search(method) else [RowGroup((row,)) for row in rows]
    return groups


def shares_search(method: str) -> bool:
    """Whether what a method finds on the first seed's mask serves the other seeds."""
    fit = get_method(method).fit
    return fit is not None and not fit.one_mask


def rate_text(rate: float) -> str:
    """A rate in a name: six digits where they are the rate, else all of them, so that no two rates share a name."""
    short = f"{rate:g}"
    return short if float(short) == rate else repr(float(rate))
