"""Philox-4x32-10 on arrays, and distinct 16-bit values from its streams: the random half of the sampler.

Every block of a tensor has one stream of 16-bit lanes, a function of (key, block) alone; the values drawn of it are the
first distinct ones in stream order, by exact integers. How many blocks are drawn at once, in which rounds, and by which
of the two ways below is a matter of speed only and never changes a value.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16
COUNT, POSITIONS = 0, 1  # the fourth word of the counter: what a draw is for
MARKED_SHARE = 8  # blocks that draw more than an eighth of their entries are marked in a table instead of sorted

_LANES = 8  # 16-bit lanes in one Philox output of 128 bits
_CHUNK_GROUPS = 1 << 14  # Philox outputs computed at once: their words and products stay in a core's cache
_DEVIATIONS = 6  # how far the lanes read ahead stay below the expected number of repeated values
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_STEPS = (np.uint64(0x9E3779B9 << 32), np.uint64(0xBB67AE85 << 32))

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]


class Blocks(NamedTuple):
    """Blocks to draw from, one row each; all arrays are (rows,).

    Attributes:
        number: of the block in its tensor, uint64.
        sizes: entries of the block, 1 to ``BLOCK``, int64.
        key0, key1: the two words of the tensor's key, uint64, each below 2**32.
        label: rising multiples of ``BLOCK``, uint32: what sets a row's values apart from the other rows'.
    """

    number: UInt64Array
    sizes: Int64Array
    key0: UInt64Array
    key1: UInt64Array
    label: UInt32Array

    def at(self, rows: Int64Array | slice) -> "Blocks":
        """The blocks of these rows."""
        return Blocks(self.number[rows], self.sizes[rows], self.key0[rows], self.key1[rows], self.label[rows])


def philox(
    counter: tuple[UInt64Array, ...], key: tuple[int, int] | tuple[UInt64Array, UInt64Array]
) -> tuple[UInt64Array, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on arrays of 32-bit words held in uint64.

    Args:
        counter: four arrays of one shape (or broadcastable), each word below 2**32.
        key: two words below 2**32, or two arrays of such words that broadcast with the counter.

    Returns:
        Four arrays of 32-bit words.
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in (*counter, *key)))
    even, odd, product = (np.empty((2, *shape), dtype=np.uint64) for _ in range(3))  # words 0 and 2, 1 and 3
    even[0], odd[0], even[1], odd[1] = counter
    (word0, word2), (to_word0, to_word2) = even, product
    key0, key1 = (_upper_half(word, shape) for word in key)
    for _ in range(10):
        np.multiply(word2, _FACTORS[1], out=to_word0)
        np.multiply(word0, _FACTORS[0], out=to_word2)
        np.bitwise_xor(to_word0, key0, out=word0)
        np.bitwise_xor(to_word2, key1, out=word2)
        even >>= _SHIFT32
        even ^= odd
        np.bitwise_and(product, _MASK32, out=odd)
        key0 += _STEPS[0]  # wraps at 2**64, as the key word in the upper half has to at 2**32
        key1 += _STEPS[1]
    return word0, odd[0], word2, odd[1]


def _upper_half(word: int | UInt64Array, shape: tuple[int, ...]) -> UInt64Array:
    """Key words times 2**32 as an array that combines fast: of one element if all are equal, else of ``shape``."""
    words = np.asarray(word, dtype=np.uint64)
    same = words.size > 0 and bool((words == words.flat[0]).all())
    return (words.reshape(-1)[:1] if same else np.broadcast_to(words, shape)) << _SHIFT32


def _lanes(
    blocks: Blocks, first: Int64Array, count: Int64Array
) -> tuple[npt.NDArray[np.uint16], BoolArray, Int64Array]:
    """Lanes ``first .. first + count`` of every block's position stream.

    A lane at or above the largest multiple of the block's size is skipped, the rest taken modulo the size, so that a
    short last block stays uniform.

    Returns:
        (rows, width) values below the block's size, which of them are lanes that were asked for and not skipped, and
        (rows,) how many those are.
    """
    group = first // _LANES
    groups = int(((first + count + _LANES - 1) // _LANES - group).max())
    index = np.arange(groups, dtype=np.uint64)[None]
    if group.any():
        index = index + group.astype(np.uint64)[:, None]
    words = np.empty((len(first), groups, 4), dtype="<u4")
    number, purpose = blocks.number[:, None], np.array([[POSITIONS]], dtype=np.uint64)
    counter = (index, number & _MASK32, number >> _SHIFT32, purpose)
    for place, word in enumerate(philox(counter, (blocks.key0[:, None], blocks.key1[:, None]))):
        words[:, :, place] = word
    lanes = words.view("<u2").reshape(len(first), groups * _LANES)
    column, begin = np.arange(groups * _LANES), (first - group * _LANES)[:, None]
    live = column < begin + count[:, None]
    if begin.any():
        live &= column >= begin
    short = np.flatnonzero(blocks.sizes < BLOCK)
    if len(short):
        sizes, value = blocks.sizes[short].astype(np.uint32)[:, None], lanes[short].astype(np.uint32)
        live[short] &= value < sizes * (BLOCK // sizes)
        lanes[short] = value % sizes
        count = count.copy()
        count[short] = np.count_nonzero(live[short], axis=1)
    return lanes, live, count


def _chunks(count: Int64Array) -> Iterator[slice]:
    """Consecutive rows whose lanes, padded to the widest of them, are computed at once."""
    groups, start = count // _LANES + 2, 0
    while start < len(count):
        widest = np.maximum.accumulate(groups[start : start + _CHUNK_GROUPS])
        rows = np.searchsorted(widest * np.arange(1, len(widest) + 1), _CHUNK_GROUPS, side="right")
        yield slice(start, start + max(int(rows), 1))
        start += max(int(rows), 1)


def _distinct_lanes(blocks: Blocks, first: Int64Array, count: Int64Array) -> UInt32Array:
    """Label plus value of the distinct values among the given lanes of every block, ascending."""
    parts = [np.empty(0, dtype=np.uint32)]
    for chunk in _chunks(count):
        part = blocks.at(chunk)
        lanes, live, taken = _lanes(part, first[chunk], count[chunk])
        np.copyto(lanes, np.uint16(BLOCK - 1), where=~live)
        lanes.sort(axis=1, kind="stable")  # a radix sort; what is not live ends up at or after place ``taken``
        kept = np.arange(lanes.shape[1]) < taken[:, None]
        kept[:, 1:] &= lanes[:, 1:] != lanes[:, :-1]
        parts.append(np.bitwise_or(lanes, part.label[:, None])[kept])
    return np.concatenate(parts)


def _not_in(values: UInt32Array, others: UInt32Array) -> UInt32Array:
    """The values that are not among the others; both ascending."""
    if not len(others):
        return values
    place = np.searchsorted(others, values)
    return values[others[np.minimum(place, len(others) - 1)] != values]


def _lanes_ahead(blocks: Blocks, counts: Int64Array) -> Int64Array:
    """Lanes to read at first for ``counts[row]`` distinct values: those, and nearly as many more as will be repeats."""
    repeats = counts * counts // (2 * blocks.sizes)
    return counts + np.maximum(repeats - _DEVIATIONS * np.sqrt(repeats).astype(np.int64), 0)


def _per_row(values: UInt32Array, blocks: Blocks) -> Int64Array:
    """How many of the ascending values each block has."""
    return np.diff(np.searchsorted(values, blocks.label), append=len(values))


def _draw_sorted(blocks: Blocks, counts: Int64Array) -> UInt32Array:
    """The first ``counts[row]`` distinct values of every block, label plus value, by sorting: work per drawn value.

    Drawing exactly as many lanes as are still missing, again and again, takes the same values as reading the stream one
    by one: no round can take more than the missing number. The first round reads ahead, and a block that got too many
    values by that, which is rare, starts again without.
    """
    rows = np.flatnonzero(counts)
    used = _lanes_ahead(blocks, counts)
    found = _distinct_lanes(blocks.at(rows), np.zeros_like(rows), used[rows])
    taken = _per_row(found, blocks)
    over = taken > counts
    if over.any():
        found = found[np.repeat(~over, taken)]
        used[over] = taken[over] = 0
    missing, later = counts - taken, found[:0]
    while missing.any():
        rows = np.flatnonzero(missing)
        part = blocks.at(rows)
        fresh = _not_in(_not_in(_distinct_lanes(part, used[rows], missing[rows]), found), later)
        later = np.sort(np.concatenate([later, fresh]), kind="stable")
        used[rows] += missing[rows]
        missing[rows] -= _per_row(fresh, part)
    return np.insert(found, np.searchsorted(found, later), later) if len(later) else found


def _draw_marked(blocks: Blocks, counts: Int64Array, rest: BoolArray) -> Int64Array:
    """As :func:`_draw_sorted`, in a table of all entries: work per entry. Where ``rest``, all values but the drawn."""
    ends = np.cumsum(blocks.sizes)
    starts, nowhere = ends - blocks.sizes, int(ends[-1])
    marks = np.zeros(nowhere + 1, dtype=np.bool_)
    row_marks = [marks[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    used, missing = np.zeros_like(counts), counts.copy()
    while missing.any():
        rows = np.flatnonzero(missing)
        for chunk in _chunks(missing[rows]):
            part = rows[chunk]
            lanes, live, _ = _lanes(blocks.at(part), used[part], missing[part])
            place = np.add(lanes, starts[part][:, None], dtype=np.int64)
            np.copyto(place, nowhere, where=~live)
            marks[place] = True
        used[rows] += missing[rows]
        missing[rows] = counts[rows] - [np.count_nonzero(row_marks[row]) for row in rows]
    for row in np.flatnonzero(rest):
        np.logical_not(row_marks[row], out=row_marks[row])
    places = np.flatnonzero(marks[:-1])
    return places + np.repeat(blocks.label - starts, np.where(rest, blocks.sizes - counts, counts))


def draw_distinct(blocks: Blocks, counts: Int64Array) -> npt.NDArray[np.integer]:
    """``counts[row]`` distinct values below ``sizes[row]`` of every block: label plus value, ascending.

    They are the first distinct ones of the block's stream; a block that asks for more than half of its entries draws
    those it leaves out.
    """
    rest = counts * 2 > blocks.sizes
    drawn = np.where(rest, blocks.sizes - counts, counts)
    marked = rest | (drawn * MARKED_SHARE > blocks.sizes)
    by_sort, by_mark = np.flatnonzero(~marked), np.flatnonzero(marked)
    if not len(by_mark):
        return _draw_sorted(blocks, counts)
    table = _draw_marked(blocks.at(by_mark), drawn[by_mark], rest[by_mark])
    if not len(by_sort):
        return table
    return np.sort(np.concatenate([_draw_sorted(blocks.at(by_sort), drawn[by_sort]), table]), kind="stable")
