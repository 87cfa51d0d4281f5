"""Low rank: the delta of every linear map as the product of two thin factors, with a sampled rest where it is wanted.

delta ~ B A, B (out, r) and A (r, in): the largest r directions of the delta itself (Eckart and Young 1936), or of
delta C^(1/2) with C the centred second moment of the map's inputs, which is the least squares fit of its outputs.
Tensors of one column, biases and norms, are held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from dpp_lightning.methods import training
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.kept_entries import KeptEntries
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.sampling.sampler import exact_rate, kept_positions_of
from dpp_lightning.tensors.factors import Factors, matrix_shape, stored_numbers
from dpp_lightning.tensors.finite import is_finite

Spread = Literal["auto", "even", "energy"]
FactorsDtype = Literal["int2", "int3", "int4", "int8", "bfloat16", "float16", "float32"]

FACTORS_DTYPE, REST_DTYPE = "int3", "int2"
DAMPING = 0.75  # of a sampled rest: sampling is unbiased and noisy, the product has what is large
_SPREAD_BELOW = 4  # even ranks from which spreading them by singular values gains nothing
_MOST_TIMES = 4  # the even rank that one map may have where ranks are spread
_EXACT_SIDE = 1024  # larger maps are decomposed by a randomised range finder (Halko, Martinsson and Tropp 2011)
_OVERSAMPLED, _POWERS = 16, 4
_LEVEL, _MOST_KEPT = 16, 64  # directions of a map that are found at once at least, and kept at most
_RIDGE = 1e-7  # of the largest variance of an input, added to all: second moments of few tokens are singular


def low_rank(
    pairs: Sequence[TensorPair],
    pruning_rate: float,
    seed: int,
    *,
    rank: int = 0,
    spread: Spread = "auto",
    rest: float = 1.0,
    damping: float = DAMPING,
    factors_dtype: FactorsDtype = "int3",
) -> Iterator[KeptEntries]:
    """Keep the largest directions of every map, tensors of one column whole, and a sample of the rest if asked for.

    Args:
        pairs: as for every selection.
        pruning_rate: without a rank: numbers of the factors are the fraction 1 - p of the entries.
        seed: of the sampled rest.
        rank: directions of every map, or as many in the mean; 0 goes by the rate.
        spread: ``even`` gives every map the same rank; ``energy`` the same numbers to the directions with the largest
            squared singular value per number; ``auto`` is ``energy`` below rank 4.
        rest: fraction of the maps' entries dropped of what the product leaves, in (0, 1]; the others are drawn as those
            of ``dare``, so that no positions are stored. 1 for none.
        damping: what the sampled rest is multiplied by.
        factors_dtype: how the file holds the factors.

    Raises:
        ValueError: a rate at which no map has a direction, or settings out of their range.
    """
    verify({"rank": rank, "rest": rest} | ({"damping": damping} if rest < 1 else {}))
    factors = decompose(pairs, ranks_of(pairs, pruning_rate, rank, spread))
    rounded = [part.rounded(factors_dtype, pair.name) for pair, part in zip(pairs, factors, strict=True)]
    yield from with_rest(pairs, rounded, factors, seed, rest, damping)


def with_rest(
    pairs: Sequence[TensorPair],
    rounded: Sequence[Factors],
    factors: Sequence[Factors],
    seed: int,
    rest: float,
    damping: float,
) -> Iterator[KeptEntries]:
    """Factors with a sample of what their product, as the file holds it, leaves of the maps.

    Args:
        pairs: the tensors.
        rounded: their factors as the file holds them.
        factors: the same before they are rounded, which are yielded.
        seed, rest, damping: as for :func:`low_rank`.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    maps = [(pair.name, pair.numel) for pair, part in zip(pairs, factors, strict=True) if not part.is_whole]
    drawn = kept_positions_of(maps, rest, seed) if rest < 1 else iter(())
    for pair, part, held in zip(pairs, factors, rounded, strict=True):
        if rest == 1 or part.is_whole:
            yield KeptEntries(nothing, torch.empty(0), part)
        else:
            positions = torch.from_numpy(next(drawn))
            values = replace(pair, factors=held).delta_at(positions)
            yield KeptEntries(positions, values * (damping / float(1 - exact_rate(rest))), part)


def rest_of(settings: Mapping[str, Any]) -> float:
    """The rate at which what the product leaves is drawn; settings of :func:`low_rank`."""
    return float(settings.get("rest", 1.0))


def verify(settings: Mapping[str, Any]) -> None:
    """Refuse settings of :func:`low_rank` that are out of their range.

    Raises:
        ValueError: a rank that is no whole number >= 0, a rest outside (0, 1], a damping outside (0, 1] or without a
            rest, or settings of training that are out of their range, or beside a rest.
    """
    training.verify(settings)
    if rest_of(settings) < 1 and (trained := sorted(training.Training.among(settings))):
        raise ValueError(
            f"nothing is trained beside a sampled rest, which would undo it: leave rest= or {', '.join(trained)} out"
        )
    rank = settings.get("rank", 0)
    if rank != int(rank) or rank < 0:
        raise ValueError(f"rank must be a whole number, 1 or more, or 0 to go by the pruning rate; got {rank!r}")
    for name in ("rest", "damping"):
        if not 0 < settings.get(name, 1) <= 1:
            raise ValueError(f"{name} must be a number in (0, 1], got {settings[name]!r}")
    if "damping" in settings and rest_of(settings) == 1:
        raise ValueError("damping is of a sampled rest, and there is none: give rest= too, or leave damping= out")


def by_rank(settings: Mapping[str, Any]) -> bool:
    """Whether a rank says how much is kept, so that the pruning rate plays no part."""
    return bool(settings.get("rank", 0))


def ranks_of(pairs: Sequence[TensorPair], pruning_rate: float, rank: int, spread: Spread) -> list[int]:
    """The rank of every tensor, 1 for those of one column; arguments as for :func:`low_rank`.

    Raises:
        ValueError: the rate leaves no map a direction.
    """
    shapes = [matrix_shape(pair.shape) for pair in pairs]
    budget = numbers_at(shapes, pruning_rate, rank)
    maps = [shape for shape in shapes if shape[1] > 1]
    even = rank or even_rank(maps, budget)
    if spread == "energy" or (spread == "auto" and even < _SPREAD_BELOW):
        return spread_ranks(pairs, shapes, budget, even)
    if even < 1:
        raise ValueError(
            f"pruning_rate={pruning_rate:g} leaves {budget:,.0f} numbers for {len(maps)} maps, less than one direction "
            "each: take a lower rate, or spread=energy"
        )
    return [1 if shape[1] == 1 else min(int(even), *shape) for shape in shapes]


def even_rank(maps: Sequence[tuple[int, int]], budget: float) -> float:
    """The rank of every map at which these have so many numbers, those of fewer rows or columns their full one.

    Args:
        maps: rows and columns.
        budget: numbers of all factors together.
    """
    rank, spent = 0, 0.0
    while growing := sum(rows + columns for rows, columns in maps if min(rows, columns) > rank):
        if spent + growing > budget:
            return rank + (budget - spent) / growing
        rank, spent = rank + 1, spent + growing
    return rank


def numbers_at(shapes: Sequence[tuple[int, int]], pruning_rate: float, rank: int) -> float:
    """How many numbers the factors of the maps may have: those of an even rank, or what the rate leaves beside the
    tensors of one column.

    Args:
        shapes: rows and columns of all tensors.
        pruning_rate, rank: as for :func:`low_rank`.

    Raises:
        ValueError: the rate leaves nothing.
    """
    if rank:
        return sum(stored_numbers(*shape, min(int(rank), *shape)) for shape in shapes if shape[1] > 1)
    if pruning_rate == 0:
        raise ValueError("at a rate of 0 a low rank keeps less than its rate says: give a rate above 0, or rank=")
    whole = sum(rows for rows, columns in shapes if columns == 1)
    budget = float((1 - exact_rate(pruning_rate)) * sum(rows * columns for rows, columns in shapes)) - whole
    if budget <= 0:
        raise ValueError(
            f"a rate of {pruning_rate:g} among maps, biases and norms leaves fewer numbers than biases and norms have "
            f"({whole:,}): take a lower rate, or a method that samples entries, such as 'refit' or 'importance'"
        )
    return budget


def spread_ranks(
    pairs: Sequence[TensorPair], shapes: Sequence[tuple[int, int]], budget: float, even: float
) -> list[int]:
    """Ranks by squared singular value per number: the directions that explain most of the delta for their size."""
    most = max(_MOST_TIMES, int(_MOST_TIMES * even))
    directions: list[tuple[float, int, int]] = []
    for index, (pair, (rows, columns)) in enumerate(zip(pairs, shapes, strict=True)):
        if columns > 1 and rows:
            delta = _matrix(pair)
            squares = (_leading(pair, delta, min(most, rows, columns)).t() @ delta.double()).square().sum(1)
            directions += [(-float(square) / (rows + columns), index, rows + columns) for square in squares]
    ranks = [1 if columns == 1 else 0 for _, columns in shapes]
    for _, index, size in sorted(directions):
        if size > budget:
            break
        ranks[index] += 1
        budget -= size
    return ranks


def _matrix(pair: TensorPair) -> Tensor:
    """The delta of a tensor as a matrix, which no decomposition takes where it is not finite.

    Raises:
        ValueError: NaN or infinity in it.
    """
    delta = pair.delta().view(matrix_shape(pair.shape))
    if not is_finite(delta):
        raise ValueError(f"{pair.name}: the delta is not finite, so that it has no directions")
    return delta


def decompose(
    pairs: Sequence[TensorPair], ranks: Sequence[int], *, weighted: bool = False, balanced: bool = True
) -> list[Factors]:
    """The factors of every tensor.

    Args:
        pairs: the tensors; for weighted directions with the second moments of their inputs where these are known.
        ranks: of each, 1 for those of one column.
        weighted: directions are those of the outputs on calibration data.
        balanced: both factors of a direction have equal norms, so that they are rounded and trained alike.
    """
    found = []
    for pair, rank in zip(pairs, ranks, strict=True):
        _, columns = matrix_shape(pair.shape)
        delta = _matrix(pair)
        if columns == 1 or not delta.numel():
            found.append(Factors.whole(delta) if columns == 1 else Factors(delta[:, :0], delta.new_zeros(0, columns)))
            continue
        metric = input_metric(pair.inputs, pair.shape) if weighted and rank else None
        if metric is None:
            left = _leading(pair, delta, rank)
            right = left.t() @ delta.double()
        else:
            left, right = _weighted(delta, rank, *metric)
        if balanced:
            scale = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
            left, right = left * scale, right / scale[:, None]
        found.append(Factors(left.float(), right.float()))
    return found


def input_metric(inputs: InputStatistics | None, shape: Sequence[int]) -> tuple[Tensor, bool] | None:
    """The covariance of a map's inputs with a ridge, float64, and whether they index the rows; None where unknown."""
    if inputs is None or inputs.products is None or len(shape) != 2 or not inputs.of_one_map:
        return None
    covariance = inputs.covariance
    size = len(covariance)
    ridge = _RIDGE * covariance.diagonal().max() * torch.eye(size, dtype=torch.float64)
    return covariance + ridge, inputs.axis == 0


def _leading(pair: TensorPair, delta: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of a tensor's delta, float64, shape (rows, rank).

    They are found for 16, 32 or 64 directions at once and kept with the pair, so that further ranks cost nothing, and
    one rank gives the same directions whatever was asked for before.
    """
    level = max(_LEVEL, 1 << max(rank - 1, 0).bit_length())
    if level > _MOST_KEPT:
        return _directions(delta, rank)
    known = pair.leading_directions
    if level not in known:
        known[level] = _directions(delta, min(level, *delta.shape)).clone()
    return known[level][:, :rank]


def _directions(matrix: Tensor, rank: int, metric: Tensor | None = None) -> Tensor:
    """The first left singular vectors of a matrix, or of matrix metric^(1/2), float64, shape (rows, rank)."""
    rows, columns = matrix.shape
    m = matrix.double()
    if min(rows, columns) > _EXACT_SIDE:
        basis = _range(m, rank, metric)
        small = basis.t() @ m
        if metric is None:
            return basis @ torch.linalg.svd(small, full_matrices=False).U[:, :rank]
        return basis @ _largest(small @ metric @ small.t(), rank)
    if rows <= columns:
        return _largest((m if metric is None else m @ metric) @ m.t(), rank)
    if metric is not None:
        m = m @ _root(metric)
    return _orthonormal(m @ _largest(m.t() @ m, rank))


def _largest(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of a symmetric matrix, shape (rows, rank)."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def _weighted(matrix: Tensor, rank: int, metric: Tensor, of_rows: bool) -> tuple[Tensor, Tensor]:
    """Factors of the rank nearest to a matrix in the metric of its inputs, float64.

    U U^T matrix with U the left singular vectors of matrix metric^(1/2); of a map x W whose inputs index the rows
    W V V^T with V the right singular vectors of metric^(1/2) W.
    """
    m = matrix.double()
    if of_rows:
        right = _directions(m.t(), rank, metric)
        return m @ right, right.t()
    left = _directions(m, rank, metric)
    return left, left.t() @ m


def _root(metric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(metric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()


def _orthonormal(vectors: Tensor) -> Tensor:
    return torch.linalg.qr(vectors).Q if vectors.shape[1] else vectors


def _range(matrix: Tensor, rank: int, metric: Tensor | None) -> Tensor:
    """An orthonormal basis of nearly the largest directions, shape (rows, rank + oversampled), the same every time.

    The root of a metric, which takes minutes for many inputs, is not needed: matrix metric matrix^T is applied.
    """
    count = min(rank + _OVERSAMPLED, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(matrix.shape[1], count, generator=generator, dtype=matrix.dtype)
    basis = _orthonormal(matrix @ inputs)
    for _ in range(_POWERS):
        inputs = matrix.t() @ basis
        basis = _orthonormal(matrix @ (_orthonormal(inputs) if metric is None else metric @ inputs))
    return basis


def mean_shift(pair: TensorPair, change: Tensor) -> Tensor | None:
    """What the bias of a map takes so that its mean output is as in the fine-tuned model: (delta - change) x_mean.

    Args:
        pair: the map's weight.
        change: its delta as a file holds it, B A and the sampled rest, float32, of its shape.

    Returns:
        Float32, shape (outputs,); None where the inputs are not known.
    """
    inputs = pair.inputs
    if inputs is None or not inputs.of_one_map or len(pair.shape) != 2:
        return None
    left = (pair.delta().view(pair.shape) - change).double()
    mean = inputs.mean.double()
    return (left @ mean if inputs.axis == 1 else left.t() @ mean).float()


def numbers_kept(shapes: Sequence[tuple[int, ...]], pruning_rate: float, settings: Mapping[str, Any]) -> float:
    """How many numbers low rank keeps of tensors of these shapes: those of the factors, and of the sampled rest.

    Args:
        shapes: of all tensors that it covers.
        pruning_rate: without a rank, of these tensors.
        settings: of :func:`low_rank`.
    """
    matrices = [matrix_shape(shape) for shape in shapes]
    whole = sum(rows for rows, columns in matrices if columns == 1)
    of_maps = sum(rows * columns for rows, columns in matrices if columns > 1)
    sampled = (1 - rest_of(settings)) * of_maps
    return numbers_at(matrices, pruning_rate, int(settings.get("rank", 0))) + whole + sampled
