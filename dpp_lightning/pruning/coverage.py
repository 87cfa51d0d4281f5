"""Methods that hold only some of the tensors in scope: which they leave out, and the rate among the others."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from math import prod

from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.sampling.sampler import exact_rate

_SHOWN = 3  # names in a message


def uncovered(spec: PruningSpec, shapes: Mapping[str, tuple[int, ...]], grown: Container[str]) -> list[str]:
    """Names of the tensors in scope that the spec's method leaves at the base's values.

    Args:
        spec: of a method that covers some of the tensors.
        shapes: canonical name to shape of the tensors in scope.
        grown: names of those that have more rows than the base's.

    Raises:
        ValueError: the method covers no tensor, or leaves out one that grew.
    """
    covers = spec.row.covers
    assert covers is not None
    left_out = [name for name, shape in shapes.items() if not covers(name, shape, spec.method_settings)]
    longer = [name for name in left_out if name in grown]
    if longer:
        raise ValueError(
            f"{spec.method} leaves {', '.join(longer)} at the base's values, but the fine-tuned vocabulary has more "
            "rows: store it dense (carry=, --carry), or take a method that prunes every tensor"
        )
    if shapes and len(left_out) == len(shapes):
        raise ValueError(f"{spec.method} covers none of the tensors in scope, such as {', '.join(left_out[:_SHOWN])}")
    return left_out


def rate_among(spec: PruningSpec, covered: int, in_scope: int) -> float:
    """The rate among the entries that a method covers at which all entries in scope have the spec's pruning rate.

    Where the rate plays no part it is 0 at the least; where nothing is covered, the spec's own.

    Args:
        spec: has the rate.
        covered, in_scope: numbers of entries.

    Raises:
        ValueError: the rate keeps more entries than are covered.
    """
    if not covered:
        return float(spec.pruning_rate)
    rate = 1 - float(1 - exact_rate(spec.pruning_rate)) * in_scope / covered
    if rate < 0 and spec.ignores_rate:
        return 0.0
    if rate < 0:
        raise ValueError(
            f"pruning_rate={spec.pruning_rate:g} keeps more than the {covered:,} of {in_scope:,} entries that "
            f"{spec.method} covers: take a rate of {1 - covered / in_scope:.3g} or more, or another method"
        )
    return rate


def least_rate(spec: PruningSpec, shapes: Mapping[str, tuple[int, ...]], grown: Container[str]) -> float:
    """The lowest pruning rate that a method can have, at which it keeps every entry of the tensors that it covers.

    Args:
        spec, shapes, grown: as for :func:`uncovered`.

    Raises:
        ValueError: as there.
    """
    if spec.row.covers is None:
        return 0.0
    return sum(prod(shapes[name]) for name in uncovered(spec, shapes, grown)) / sum(map(prod, shapes.values()))


def check_rates(specs: Iterable[PruningSpec], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a rate that leaves a method nothing to hold, as the shapes alone tell it.

    Args:
        specs: what will be pruned.
        shapes: canonical name to shape of the tensors in scope.

    Raises:
        ValueError: a method covers no tensor, or its rate keeps more than these have, or less than it needs.
    """
    for spec in specs:
        if spec.row.covers is None:
            continue
        left_out = set(uncovered(spec, shapes, ()))
        covered = [shape for name, shape in shapes.items() if name not in left_out]
        try:
            rate = rate_among(spec, sum(map(prod, covered)), sum(map(prod, shapes.values())))
            if spec.row.numbers is not None:
                spec.row.numbers(covered, rate, spec.method_settings)
        except ValueError as error:
            raise ValueError(f"{spec.method} at pruning_rate={spec.pruning_rate:g}: {error}") from error
