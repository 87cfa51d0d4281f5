"""Philox-4x32-10 on arrays, and distinct 16-bit values drawn from its streams: the random half of the sampler.

Every block of a tensor has one stream of 16-bit lanes, a function of (key, block) alone, and the values drawn are the
first distinct ones in stream order. All arithmetic is on integers. How many blocks are drawn at once, in how many
rounds, and whether values are sorted or marked in a table, is a matter of speed only and never changes a value.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16
COUNT, POSITIONS = 0, 1  # the fourth word of the counter: what a draw is for
MARKED_SHARE = 8  # blocks that draw more than an eighth of their entries are marked in a table instead of sorted

_LANES = 8  # 16-bit lanes in one Philox output of 128 bits
_CHUNK_OUTPUTS = 1 << 14  # Philox outputs computed at once: their words and products stay in a core's cache
_DEVIATIONS = 6  # standard deviations by which the lanes read ahead stay below the expected number of repeats
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_STEPS = (np.uint64(0x9E3779B9 << 32), np.uint64(0xBB67AE85 << 32))

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]


class Blocks(NamedTuple):
    """Blocks to draw from, one row each; all arrays have the shape (rows,).

    Attributes:
        number: the index of the block in its tensor, uint64.
        sizes: the number of entries in the block, 1 to ``BLOCK``, int64.
        key0, key1: the two words of the tensor's key, uint64, each below 2**32.
        label: an ascending multiple of ``BLOCK`` for each row, uint32. Label plus value is different in every row, so
            that the values of many blocks can stand in one sorted array.
    """

    number: UInt64Array
    sizes: Int64Array
    key0: UInt64Array
    key1: UInt64Array
    label: UInt32Array

    def select(self, rows: Int64Array | slice) -> "Blocks":
        """The blocks in these rows."""
        return Blocks(self.number[rows], self.sizes[rows], self.key0[rows], self.key1[rows], self.label[rows])


def philox(
    counter: tuple[UInt64Array, ...], key: tuple[int, int] | tuple[UInt64Array, UInt64Array]
) -> tuple[UInt64Array, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on arrays of 32-bit words held in uint64.

    Args:
        counter: four arrays of words below 2**32, broadcastable to one shape.
        key: two words below 2**32, or two arrays of such words that broadcast with the counter.

    Returns:
        Four arrays of 32-bit words in uint64, of the broadcast shape.
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
    """Key words times 2**32: one element if all are equal, which numpy combines faster, else of the given shape."""
    words = np.asarray(word, dtype=np.uint64)
    all_equal = words.size > 0 and bool((words == words.flat[0]).all())
    return (words.reshape(-1)[:1] if all_equal else np.broadcast_to(words, shape)) << _SHIFT32


def _lanes(
    blocks: Blocks, first: Int64Array, count: Int64Array
) -> tuple[npt.NDArray[np.uint16], BoolArray, Int64Array]:
    """Lanes ``first .. first + count`` of every block's position stream.

    In a block of fewer than ``BLOCK`` entries, a lane at or above the largest multiple of the block's size is skipped
    and the others are taken modulo the size, which keeps the values uniform.

    Args:
        blocks: the blocks, one row each.
        first, count: shape (rows,), the first lane of each block and how many.

    Returns:
        values: (rows, width), uint16 below the block's size.
        live: (rows, width), which of the values belong to lanes that were asked for and are not skipped.
        taken: (rows,), how many of each row are live.
    """
    first_output = first // _LANES
    outputs = int(((first + count + _LANES - 1) // _LANES - first_output).max())
    index = np.arange(outputs, dtype=np.uint64)[None]
    if first_output.any():
        index = index + first_output.astype(np.uint64)[:, None]
    words = np.empty((len(first), outputs, 4), dtype="<u4")
    number, purpose = blocks.number[:, None], np.array([[POSITIONS]], dtype=np.uint64)
    counter = (index, number & _MASK32, number >> _SHIFT32, purpose)
    for i, word in enumerate(philox(counter, (blocks.key0[:, None], blocks.key1[:, None]))):
        words[:, :, i] = word
    lanes = words.view("<u2").reshape(len(first), outputs * _LANES)
    column, begin = np.arange(outputs * _LANES), (first - first_output * _LANES)[:, None]
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
    outputs, start = count // _LANES + 2, 0
    while start < len(count):
        widest = np.maximum.accumulate(outputs[start : start + _CHUNK_OUTPUTS])
        rows = np.searchsorted(widest * np.arange(1, len(widest) + 1), _CHUNK_OUTPUTS, side="right")
        yield slice(start, start + max(int(rows), 1))
        start += max(int(rows), 1)


def _distinct_lanes(blocks: Blocks, first: Int64Array, count: Int64Array) -> UInt32Array:
    """Label plus value of the distinct values among lanes ``first .. first + count`` of every block, ascending."""
    labelled = [np.empty(0, dtype=np.uint32)]
    for chunk in _chunks(count):
        chunk_blocks = blocks.select(chunk)
        lanes, live, taken = _lanes(chunk_blocks, first[chunk], count[chunk])
        np.copyto(lanes, np.uint16(BLOCK - 1), where=~live)
        lanes.sort(axis=1, kind="stable")  # a radix sort; what is not live ends up at or after column ``taken``
        kept = np.arange(lanes.shape[1]) < taken[:, None]
        kept[:, 1:] &= lanes[:, 1:] != lanes[:, :-1]
        labelled.append(np.bitwise_or(lanes, chunk_blocks.label[:, None])[kept])
    return np.concatenate(labelled)


def _not_in(values: UInt32Array, excluded: UInt32Array) -> UInt32Array:
    """The values that are not among the excluded ones; both arrays are ascending."""
    if not len(excluded):
        return values
    index = np.searchsorted(excluded, values)
    return values[excluded[np.minimum(index, len(excluded) - 1)] != values]


def _lanes_ahead(blocks: Blocks, counts: Int64Array) -> Int64Array:
    """Lanes to read first for ``counts[row]`` distinct values: that many, and nearly as many more as repeat others."""
    repeats = counts * counts // (2 * blocks.sizes)
    return counts + np.maximum(repeats - _DEVIATIONS * np.sqrt(repeats).astype(np.int64), 0)


def _per_row(values: UInt32Array, blocks: Blocks) -> Int64Array:
    """How many of the ascending labelled values belong to each block."""
    return np.diff(np.searchsorted(values, blocks.label), append=len(values))


def _draw_sorted(blocks: Blocks, counts: Int64Array) -> UInt32Array:
    """The first ``counts[row]`` distinct values of every block, label plus value, by sorting: work per drawn value.

    Each round reads exactly as many lanes as values are still missing. No round can take more than that number, so the
    values are those of reading the stream lane by lane. Only the first round reads ahead; a block that has too many
    values after it, which is rare, starts again without reading ahead.
    """
    rows = np.flatnonzero(counts)
    used = _lanes_ahead(blocks, counts)
    drawn = _distinct_lanes(blocks.select(rows), np.zeros_like(rows), used[rows])
    taken = _per_row(drawn, blocks)
    over = taken > counts
    if over.any():
        drawn = drawn[np.repeat(~over, taken)]
        used[over] = taken[over] = 0
    missing, later = counts - taken, drawn[:0]
    while missing.any():
        rows = np.flatnonzero(missing)
        unfinished = blocks.select(rows)
        fresh = _not_in(_not_in(_distinct_lanes(unfinished, used[rows], missing[rows]), drawn), later)
        later = np.sort(np.concatenate([later, fresh]), kind="stable")
        used[rows] += missing[rows]
        missing[rows] -= _per_row(fresh, unfinished)
    return np.insert(drawn, np.searchsorted(drawn, later), later) if len(later) else drawn


def _draw_marked(blocks: Blocks, counts: Int64Array, inverted: BoolArray) -> Int64Array:
    """As :func:`_draw_sorted`, by marking in a table of all entries: work per entry.

    A block of a row where ``inverted`` is true gives the values that were not drawn.
    """
    ends = np.cumsum(blocks.sizes)
    starts, nowhere = ends - blocks.sizes, int(ends[-1])
    marks = np.zeros(nowhere + 1, dtype=np.bool_)
    row_marks = [marks[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    used, missing = np.zeros_like(counts), counts.copy()
    while missing.any():
        rows = np.flatnonzero(missing)
        for chunk in _chunks(missing[rows]):
            chunk_rows = rows[chunk]
            lanes, live, _ = _lanes(blocks.select(chunk_rows), used[chunk_rows], missing[chunk_rows])
            index = np.add(lanes, starts[chunk_rows][:, None], dtype=np.int64)
            np.copyto(index, nowhere, where=~live)
            marks[index] = True
        used[rows] += missing[rows]
        missing[rows] = counts[rows] - [np.count_nonzero(row_marks[row]) for row in rows]
    for row in np.flatnonzero(inverted):
        np.logical_not(row_marks[row], out=row_marks[row])
    marked = np.flatnonzero(marks[:-1])
    return marked + np.repeat(blocks.label - starts, np.where(inverted, blocks.sizes - counts, counts))


def draw_distinct(blocks: Blocks, counts: Int64Array) -> npt.NDArray[np.integer]:
    """``counts[row]`` distinct values below ``sizes[row]`` of every block.

    They are the first distinct values in the block's stream. A block that asks for more than half of its entries draws
    the values that it leaves out instead.

    Args:
        blocks: the blocks, one row each.
        counts: shape (rows,), each from 0 to the block's size.

    Returns:
        Label plus value of all blocks together, ascending, shape (sum of counts,).
    """
    inverted = counts * 2 > blocks.sizes
    draws = np.where(inverted, blocks.sizes - counts, counts)
    marked = inverted | (draws * MARKED_SHARE > blocks.sizes)
    by_sort, by_mark = np.flatnonzero(~marked), np.flatnonzero(marked)
    if not len(by_mark):
        return _draw_sorted(blocks, counts)
    from_table = _draw_marked(blocks.select(by_mark), draws[by_mark], inverted[by_mark])
    if not len(by_sort):
        return from_table
    return np.sort(np.concatenate([_draw_sorted(blocks.select(by_sort), draws[by_sort]), from_table]), kind="stable")
