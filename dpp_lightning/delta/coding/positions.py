"""Kept positions to bytes and back, close to their entropy.

``gaps``: the number of dropped entries before each kept one, its low bits (as many as make the rest about 32 to 64 on
average) packed as they are, the rest as bytes for an entropy coder, 255 meaning "255 more, go on". For independent
entries the gaps are geometric, for which both splits lose nothing. ``bitmap``: one bit an entry, for dense selections.
``all``: nothing, every entry is kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

SEED, ALL, GAPS, BITMAP = 0, 1, 2, 3  # codings; SEED stores nothing here, the sampler gives the positions
CODINGS = (SEED, ALL, GAPS, BITMAP)
_ESCAPE = 255
_DENSE = 5  # a bitmap is smaller than gaps if at least one in so many entries is kept
_HIGH_BITS = 6  # the high parts of the gaps average less than 2**6, and at least half of that where low bits exist


def encode_positions(positions: Int64Array, span: int) -> tuple[int, int, list[ByteArray]]:
    """Sorted distinct positions in [0, span) as (coding, shift, streams of bytes)."""
    kept = len(positions)
    if kept == span:
        return ALL, 0, []
    if kept * _DENSE >= span:
        marks = np.zeros(span, dtype=np.bool_)
        marks[positions] = True
        return BITMAP, 0, [np.packbits(marks, bitorder="little")]
    if kept == 0:
        return GAPS, 0, [np.empty(0, np.uint8), np.empty(0, np.uint8)]
    gaps = np.diff(positions, prepend=-1) - 1
    shift = max(0, ((int(positions[-1]) + 1 - kept) // kept).bit_length() - _HIGH_BITS)
    return GAPS, shift, [_escaped(gaps >> shift), _pack_bits(gaps & ((1 << shift) - 1), shift)]


def largest_streams(coding: int, shift: int, kept: int, span: int) -> list[int]:
    """The most bytes that each stream of ``kept`` positions in [0, span) can have, to bound what a file may claim.

    About one and a quarter byte a kept entry and its low bits, or five bits a kept entry, whatever the span.
    """
    if coding == GAPS:
        return [kept + min(span >> shift, kept << _HIGH_BITS) // _ESCAPE, (kept * shift + 7) // 8]
    return [(min(span, kept * _DENSE) + 7) // 8] if coding == BITMAP else []


def decode_positions(coding: int, shift: int, streams: list[ByteArray], kept: int, span: int) -> Int64Array:
    """The inverse of :func:`encode_positions`.

    Raises:
        ValueError: streams that are not ``kept`` ascending positions inside [0, span).
    """
    if coding == ALL:
        if kept != span:
            raise ValueError(f"'all' positions state {kept} kept of {span} entries")
        return np.arange(span, dtype=np.int64)
    if coding == BITMAP:
        if len(streams[0]) != (span + 7) // 8:
            raise ValueError(f"a bitmap of {len(streams[0])} bytes is not that of {span} entries")
        positions = np.flatnonzero(np.unpackbits(streams[0], count=span, bitorder="little"))
        if len(positions) != kept:
            raise ValueError(f"a bitmap marks {len(positions)} entries, {kept} were stated")
        return positions
    return _decode_gaps(shift, streams[0], streams[1], kept, span)


def _decode_gaps(shift: int, high: ByteArray, low: ByteArray, kept: int, span: int) -> Int64Array:
    if (shift and kept << (shift + _HIGH_BITS - 1) > span) or len(low) != (kept * shift + 7) // 8:
        raise ValueError(f"gaps of {kept} kept in {span} entries have no {shift} low bits in {len(low)} bytes")
    ends = high != _ESCAPE
    if np.count_nonzero(ends) != kept or (len(high) and not ends[-1]):
        raise ValueError(f"the gap bytes end {np.count_nonzero(ends)} gaps, {kept} were stated")
    if kept == 0:
        return np.empty(0, dtype=np.int64)
    total = np.cumsum(high, dtype=np.int64)
    if len(high) != kept:
        total = total[ends]
    if int(total[-1]) > span >> shift:
        raise ValueError(f"the gaps lead beyond the {span} entries")
    positions = (total << shift) + np.arange(kept)
    if shift:
        positions += np.cumsum(_unpack_bits(low, shift, kept))
    if int(positions[-1]) >= span:
        raise ValueError(f"the gaps lead to position {int(positions[-1])} of {span} entries")
    return positions


def _escaped(high: Int64Array) -> ByteArray:
    """Every number as as many bytes 255 as fit into it, then the rest."""
    long = np.flatnonzero(high >= _ESCAPE)
    if not len(long):
        return high.astype(np.uint8)
    runs = np.zeros_like(high)
    runs[long] = high[long] // _ESCAPE
    ends = np.cumsum(runs) + np.arange(len(high))
    out = np.full(int(ends[-1]) + 1, _ESCAPE, dtype=np.uint8)
    out[ends] = high - _ESCAPE * runs
    return out


def _pack_bits(numbers: Int64Array, width: int) -> ByteArray:
    """``width`` bits a number, lowest first, one after the other."""
    if width == 0:
        return np.empty(0, dtype=np.uint8)
    bits = np.empty((len(numbers), width), dtype=np.uint8)
    for j in range(width):
        bits[:, j] = (numbers >> j) & 1
    return np.packbits(bits, bitorder="little")


def _unpack_bits(packed: ByteArray, width: int, count: int) -> Int64Array:
    bits = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    numbers = np.zeros(count, dtype=np.int64)
    for j in range(width):
        numbers |= bits[:, j].astype(np.int64) << j
    return numbers
