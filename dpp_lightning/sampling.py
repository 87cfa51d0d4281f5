"""The sampler: which entries a random selection keeps, as a function of (seed, tensor name, flat position) alone.

Every tensor is cut into blocks of ``BLOCK`` = 65,536 consecutive flat positions (C order). One Philox-4x32-10 stream
per (tensor, block), keyed by a hash of seed and name, gives first the number of kept entries of the block (binomial,
by exact 64-bit integer thresholds) and then that many distinct positions inside it (16-bit lanes, the first distinct
ones in stream order). So each entry is kept independently with probability 1 - p; any block can be drawn alone; and
the work is per *kept* entry. Only integers are used: the same positions come out on every machine, device, dtype and
world size.

This is part of the file format (a delta of a random selection stores its seed instead of positions): the golden
vectors in the tests pin it for ever.
"""

from fractions import Fraction
from functools import lru_cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16
SAMPLER_VERSION = 1

_COUNT, _POSITIONS = 0, 1  # the fourth word of the counter: what a draw is for
_LANES = 8  # 16-bit lanes in one Philox output of 128 bits
_CHUNK_BLOCKS = 1 << 8  # blocks drawn at once: bounds the memory of a draw, never changes its result
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


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


def philox(counter: tuple[UInt64Array, ...], key: tuple[int, int]) -> tuple[UInt64Array, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on arrays of 32-bit words held in uint64.

    Args:
        counter: four arrays of one shape (or broadcastable), each word below 2**32.
        key: two words below 2**32.

    Returns:
        Four arrays of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT32) ^ c1 ^ np.uint64(k0),
            p1 & _MASK32,
            (p0 >> _SHIFT32) ^ c3 ^ np.uint64(k1),
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def stream_key(name: str, seed: int, stream: str = "keep") -> tuple[int, int]:
    """The 64-bit Philox key of one tensor: the first bytes of SHA-256 over stream, seed and canonical tensor name."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"a mask seed must be an integer >= 0, got {seed!r}")
    digest = sha256(f"dpp{SAMPLER_VERSION}:{stream}:{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@lru_cache(maxsize=512)
def _binomial_thresholds(n: int, keep: Fraction) -> tuple[int, UInt64Array]:
    """(lowest count c0, T) with T[j] = floor(2**64 * P(count <= c0 + j)) for Binomial(n, keep), in exact integers.

    The weights start from 2**256 at the mode and follow the ratio of neighbouring terms in both directions until they
    vanish, so that the thresholds are right to the last of their 64 bits but for a rounding far below it.
    """
    a, b = keep.numerator, keep.denominator - keep.numerator
    mode = min(n, (n + 1) * keep.numerator // keep.denominator)
    above, weight, count = [], 1 << 256, mode
    while weight and count <= n:
        above.append(weight)
        weight = weight * (n - count) * a // ((count + 1) * b)
        count += 1
    below, weight, count = [], 1 << 256, mode
    while weight and count > 0:
        weight = weight * count * b // ((n - count + 1) * a)
        below.append(weight)
        count -= 1
    weights = below[::-1] + above
    total, running, thresholds = sum(weights), 0, []
    for w in weights[:-1]:
        running += w
        thresholds.append((running << 64) // total)
    return mode - len(below), np.array(thresholds, dtype=np.uint64)


def _kept_counts(blocks: UInt64Array, sizes: Int64Array, keep: Fraction, key: tuple[int, int]) -> Int64Array:
    """How many entries each block keeps: one 64-bit draw a block against the binomial's thresholds."""
    zero = np.zeros_like(blocks)
    low, high, _, _ = philox((zero, blocks & _MASK32, blocks >> _SHIFT32, zero + np.uint64(_COUNT)), key)
    draw = (high << _SHIFT32) | low
    counts = np.empty(len(blocks), dtype=np.int64)
    for size in np.unique(sizes):
        rows = sizes == size
        lowest, thresholds = _binomial_thresholds(int(size), keep)
        counts[rows] = lowest + np.searchsorted(thresholds, draw[rows], side="right")
    return counts


def _lanes(blocks: UInt64Array, first: Int64Array, count: Int64Array, key: tuple[int, int]) -> tuple[Int64Array, ...]:
    """Lanes ``first .. first + count`` of every block's position stream: (row of the block, 16-bit value), in order."""
    group = first // _LANES
    groups = (first + count + _LANES - 1) // _LANES - group
    rows = np.repeat(np.arange(len(blocks)), groups)
    start = np.cumsum(groups) - groups
    index = group[rows] + (np.arange(len(rows)) - start[rows])
    block = blocks[rows]
    purpose = np.full(len(rows), _POSITIONS, dtype=np.uint64)
    words = philox((index.astype(np.uint64), block & _MASK32, block >> _SHIFT32, purpose), key)
    value = np.stack([(w >> np.uint64(s)) & np.uint64(0xFFFF) for w in words for s in (0, 16)], axis=1).astype(np.int64)
    lane = index[:, None] * _LANES + np.arange(_LANES)
    wanted = (lane >= first[rows][:, None]) & (lane < (first + count)[rows][:, None])
    return np.broadcast_to(rows[:, None], lane.shape)[wanted], value[wanted]


def _mark_distinct(
    marks: npt.NDArray[np.bool_], blocks: UInt64Array, sizes: Int64Array, counts: Int64Array, key: tuple[int, int]
) -> None:
    """Mark in each row of ``marks`` (rows, widest block) the first ``counts[row]`` distinct values of the block's
    stream.

    Drawing exactly as many lanes as are still missing, again and again, takes the same values as reading the stream one
    by one: no round can take more than the missing number. A lane at or above the largest multiple of the block's size
    is skipped, the rest taken modulo the size, so that a short last block stays uniform.
    """
    limits = sizes * (BLOCK // sizes)
    used, missing = np.zeros_like(counts), counts
    while missing.any():
        open_rows = np.flatnonzero(missing)
        rows, value = _lanes(blocks[open_rows], used[open_rows], missing[open_rows], key)
        rows = open_rows[rows]
        accepted = value < limits[rows]
        rows, value = rows[accepted], value[accepted]
        marks[rows, value % sizes[rows]] = True
        used = used + missing
        missing = counts - np.count_nonzero(marks, axis=1)


def _draw(first_block: int, sizes: Int64Array, keep: Fraction, key: tuple[int, int]) -> Int64Array:
    """Kept flat positions of consecutive blocks, sorted. A block that keeps more than half draws what it drops."""
    blocks = np.arange(first_block, first_block + len(sizes), dtype=np.uint64)
    counts = _kept_counts(blocks, sizes, keep, key)
    dense = counts * 2 > sizes
    marks = np.zeros((len(sizes), int(sizes.max())), dtype=np.bool_)
    _mark_distinct(marks, blocks, sizes, np.where(dense, sizes - counts, counts), key)
    marks[dense] = ~marks[dense]
    marks[-1, sizes[-1] :] = False  # only the tensor's last block can be shorter than the others
    rows, value = np.divmod(np.flatnonzero(marks), marks.shape[1])
    return (rows + first_block) * BLOCK + value


def kept_positions(
    name: str, numel: int, pruning_rate: float, seed: int, *, start: int = 0, stop: int | None = None
) -> Int64Array:
    """Flat positions that a random selection keeps of one tensor; each entry independently with probability 1 - p.

    Args:
        name: canonical tensor name, see :mod:`dpp_lightning.names`.
        numel: number of entries of the whole tensor.
        pruning_rate: p, the fraction dropped, in [0, 1), read as an exact decimal; 0 keeps everything.
        seed: mask seed, an integer >= 0.
        start, stop: only positions in [start, stop) are drawn (a shard's); the rest of the tensor costs nothing.

    Returns:
        Sorted distinct int64 positions in [start, stop), the same for every way of cutting the tensor.

    Raises:
        ValueError: a rate outside [0, 1), a negative seed, or a range outside the tensor.
    """
    keep, key = 1 - exact_rate(pruning_rate), stream_key(name, seed)
    stop = numel if stop is None else stop
    if not 0 <= start <= stop <= numel:
        raise ValueError(f"positions [{start}, {stop}) are not inside a tensor of {numel} entries")
    if keep == 1 or start == stop:
        return np.arange(start, stop, dtype=np.int64)
    first, last = start // BLOCK, -(-stop // BLOCK)
    parts = []
    for chunk in range(first, last, _CHUNK_BLOCKS):
        ends = np.arange(chunk, min(chunk + _CHUNK_BLOCKS, last), dtype=np.int64)
        sizes = np.minimum(numel - ends * BLOCK, BLOCK)
        parts.append(_draw(chunk, sizes, keep, key))
    kept = np.concatenate(parts)
    return kept[np.searchsorted(kept, start) : np.searchsorted(kept, stop)]
