"""The sampler: which entries a random selection keeps, as a function of (seed, tensor name, flat position) alone.

Every tensor is cut into blocks of ``BLOCK`` = 65,536 consecutive flat positions (C order). One Philox-4x32-10 stream
per (tensor, block), keyed by a hash of seed and name, gives first the number of kept entries of the block (binomial,
by exact 64-bit integer thresholds) and then that many distinct positions inside it (16-bit lanes, the first distinct
ones in stream order; a block that keeps more than half draws what it drops). So each entry is kept independently with
probability 1 - p; any block can be drawn alone; and the work is per *kept* entry. Integers decide, and floating point
only where it cannot err: the same positions come out on every machine, device, dtype and world size.

The sampler is part of the file format, as a delta of a random selection stores its seed instead of positions. Golden
vectors in the tests pin its results; a change of any of them needs a new ``SAMPLER_VERSION``.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpp_lightning.sampling.binomial import kept_counts
from dpp_lightning.sampling.philox import (
    BLOCK,
    COUNT,
    MARKED_SHARE,
    Blocks,
    Int64Array,
    draw_distinct,
    philox,
)

SAMPLER_VERSION = 1

# How much is drawn at once. It bounds the memory of a draw and never changes the result.
_BATCH_LANES = 1 << 18  # expected lanes, where values are sorted
_BATCH_ENTRIES = 1 << 22  # entries, where they are marked in a table
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_WORDS = 8  # 32-bit words in one output of 256 bits of numpy's Philox-4x64


def exact_rate(pruning_rate: float) -> Fraction:
    """The pruning rate read as the decimal it is written as (0.99 is 99/100, not its nearest double).

    Raises:
        ValueError: the rate is not a number in [0, 1).
    """
    try:
        rate = Fraction(str(pruning_rate))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"pruning_rate must be a number in [0, 1), got {pruning_rate!r}") from None
    if not 0 <= rate < 1:
        raise ValueError(
            f"pruning_rate is the fraction of delta entries that is dropped and must be in [0, 1), got {pruning_rate!r}"
        )
    return rate


def stream_key(name: str, seed: int, stream: str = "keep") -> tuple[int, int]:
    """The 64-bit Philox key of one tensor: the first eight bytes of SHA-256 over stream, seed and canonical name.

    Args:
        name: canonical tensor name, see :mod:`dpp_lightning.tensors.names`.
        seed: mask seed, an integer >= 0.
        stream: what the draws are for; different uses of one seed and name are independent.

    Returns:
        Two words below 2**32, read in little-endian order.

    Raises:
        ValueError: the seed is not an integer >= 0.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"a mask seed must be an integer >= 0, got {seed!r}")
    digest = sha256(f"dpp{SAMPLER_VERSION}:{stream}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


class _Range(NamedTuple):
    """The flat positions [start, stop) of a tensor with ``numel`` entries, and the key of its stream."""

    key: tuple[int, int]
    numel: int
    start: int
    stop: int


def _range(name: str, numel: int, seed: int, start: int, stop: int) -> _Range:
    """The range, checked to lie inside the tensor."""
    key = stream_key(name, seed)
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"positions [{start}, {stop}) are not inside a tensor of {numel} entries")
    return _Range(key, numel, start, stop)


class _Span(NamedTuple):
    """Consecutive blocks [first, last) of one range, drawn in one batch; ``final`` where the range ends with them."""

    key: tuple[int, int]
    numel: int
    first: int
    last: int
    final: bool


def _kept_counts(blocks: Blocks, keep: Fraction) -> Int64Array:
    """How many entries each block keeps, (rows,): one 64-bit draw a block, compared with the binomial's thresholds."""
    zero = np.zeros_like(blocks.number)
    counter = (zero, blocks.number & _MASK32, blocks.number >> _SHIFT32, zero + np.uint64(COUNT))
    low, high, _, _ = philox(counter, (blocks.key0, blocks.key1))
    draw = (high << _SHIFT32) | low
    counts = np.empty(len(draw), dtype=np.int64)
    for size in np.unique(blocks.sizes):
        rows = blocks.sizes == size
        counts[rows] = kept_counts(int(size), keep, draw[rows])
    return counts


def _batches(ranges: Iterable[_Range], keep: Fraction) -> Iterator[list[_Span]]:
    """The blocks of all ranges, in order, in batches of at most 2**16 blocks and about equal work."""
    marked = keep * MARKED_SHARE > 1
    budget = _BATCH_ENTRIES if marked else min(int(_BATCH_LANES / keep), 1 << 30)
    batch: list[_Span] = []
    room = budget
    for key, numel, start, stop in ranges:
        first, end = start // BLOCK, -(-stop // BLOCK)
        while True:
            last = min(end, first + max(room // BLOCK, 1))
            batch.append(_Span(key, numel, first, last, final=last == end))
            room -= min(numel, last * BLOCK) - first * BLOCK + (budget >> 15)
            if room <= 0:
                yield batch
                batch, room = [], budget
            if last == end:
                break
            first = last
    if batch:
        yield batch


def _draw(spans: list[_Span], keep: Fraction) -> Iterator[Int64Array]:
    """Kept flat positions of every span, sorted."""
    keys, numels, firsts, lasts, _ = (np.array(field) for field in zip(*spans, strict=True))
    lengths = lasts - firsts
    ends = np.cumsum(lengths)
    starts = ends - lengths
    row = np.arange(ends[-1])
    index = row + np.repeat(firsts - starts, lengths)
    sizes = np.minimum(np.repeat(numels, lengths) - index * BLOCK, BLOCK)
    key0, key1 = np.repeat(keys.astype(np.uint64), lengths, axis=0).T
    blocks = Blocks(index.astype(np.uint64), sizes, key0, key1, (row * BLOCK).astype(np.uint32))
    counts = _kept_counts(blocks, keep)
    labelled = draw_distinct(blocks, counts)
    bounds = np.append(0, np.cumsum(counts))
    for first, start, end in zip(firsts.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield np.add(labelled[bounds[start] : bounds[end]], (first - start) * BLOCK, dtype=np.int64)


def _kept(ranges: Iterable[_Range], keep: Fraction) -> Iterator[Int64Array]:
    """Kept flat positions of every range, sorted."""
    if keep == 1:
        yield from (np.arange(start, stop, dtype=np.int64) for _, _, start, stop in ranges)
        return
    drawn: list[Int64Array] = []  # of the spans of one range
    for batch in _batches(ranges, keep):
        for span, positions in zip(batch, _draw(batch, keep), strict=True):
            drawn.append(positions)
            if span.final:
                yield drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
                drawn = []


def kept_positions_of(tensors: Iterable[tuple[str, int]], pruning_rate: float, seed: int) -> Iterator[Int64Array]:
    """The kept positions of every tensor, in order, as :func:`kept_positions` gives them for one.

    Small tensors are drawn together, so that 200 of them do not cost 200 times the overhead. Memory stays bounded: it
    holds one batch of blocks and the kept positions of one tensor.

    Args:
        tensors: canonical name and number of entries of every tensor, read as far as the next batch needs.
        pruning_rate: p, the fraction dropped, in [0, 1), read as an exact decimal; 0 keeps everything.
        seed: mask seed, an integer >= 0.

    Returns:
        An iterator over sorted distinct int64 positions, one array a tensor.

    Raises:
        ValueError: the rate is outside [0, 1) or the seed negative, at once; a number of entries is negative, when the
            iterator reaches it.
    """
    keep = 1 - exact_rate(pruning_rate)
    stream_key("", seed)
    return _kept((_range(name, numel, seed, 0, numel) for name, numel in tensors), keep)


def kept_positions(
    name: str, numel: int, pruning_rate: float, seed: int, *, start: int = 0, stop: int | None = None
) -> Int64Array:
    """The flat positions that a random selection keeps of one tensor, each independently with probability 1 - p.

    Args:
        name: canonical tensor name, see :mod:`dpp_lightning.tensors.names`.
        numel: number of entries of the whole tensor.
        pruning_rate: p, the fraction dropped, in [0, 1), read as an exact decimal; 0 keeps everything.
        seed: mask seed, an integer >= 0.
        start, stop: only positions in [start, stop) are drawn, such as those of a shard; blocks outside cost nothing.

    Returns:
        Sorted distinct int64 positions in [start, stop), the same for every way of cutting the tensor.

    Raises:
        ValueError: the rate is outside [0, 1), the seed negative, or the range outside the tensor.
    """
    keep = 1 - exact_rate(pruning_rate)
    stop = numel if stop is None else stop
    (kept,) = _kept([_range(name, numel, seed, start, stop)], keep)
    return kept[np.searchsorted(kept, start) : np.searchsorted(kept, stop)]


def uniform_words(name: str, seed: int, start: int, stop: int, stream: str = "importance") -> npt.NDArray[np.uint32]:
    """One random 32-bit word per flat position in [start, stop), a function of (seed, name, stream, position) alone.

    Word i is the (i mod 8)-th 32-bit word, lowest first, of Philox-4x64-10 at the counter i // 8 + 1. This is numpy's
    bit generator: its raw stream is stable, and it steps its counter before it generates.

    Args:
        name: canonical tensor name, see :mod:`dpp_lightning.tensors.names`.
        seed: mask seed, an integer >= 0.
        start, stop: the flat positions whose words are drawn, 0 <= start <= stop.
        stream: what the words are for; different uses of one seed and tensor are independent.

    Returns:
        Words uniform on [0, 2**32), shape (stop - start,), the same for every way of cutting the positions.

    Raises:
        ValueError: the seed is negative, or not 0 <= start <= stop.
    """
    low, high = stream_key(name, seed, stream)
    if not 0 <= start <= stop:
        raise ValueError(f"positions [{start}, {stop}) are no range: expected 0 <= start <= stop")
    first = start // _WORDS
    generator = np.random.Philox(key=np.array([low | high << 32, 0], dtype=np.uint64), counter=first)
    raw = generator.random_raw(_WORDS // 2 * (-(-stop // _WORDS) - first))
    words = raw.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)
    return words[start - first * _WORDS : stop - first * _WORDS]
