"""The sampler: which entries a random selection keeps, as a function of (seed, tensor name, flat position) alone.

A tensor is cut into blocks of ``BLOCK`` = 2**22 consecutive flat positions (C order). Every (tensor, block) has its own
stream of 32-bit words: numpy's raw Philox-4x64-10 under a key that hashes seed and name, at a counter that begins with
the block. Each word is a geometric gap to the next entry that is drawn, by a table of exact integer thresholds. So each
entry is drawn independently with one probability, the positions come out sorted, any block can be drawn alone, and the
work is per drawn entry. Drawn are the kept entries, or where more than half are kept the dropped ones. Only integers
are used: the same positions come out on every machine, device, dtype and world size.

The sampler is part of the file format, as a delta of a random selection stores its seed instead of positions. Golden
vectors in the tests pin its results; a change of any of them needs a new ``SAMPLER_VERSION``.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from hashlib import sha256
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SAMPLER_VERSION = 2
BLOCK = 1 << 22

_LONGEST = 1 << 12  # a gap that the table holds; longer ones are as many steps of this length as it takes
_UNIT = 1 << 128  # probability 1, of which gaps take their share
_CELLS = 1 << 16  # of the look-up, by the upper half of a word
_SHIFT, _MASK64 = np.uint32(16), (1 << 64) - 1
_WORDS = 8  # 32-bit words in one output of 256 bits of numpy's Philox-4x64
_DEVIATIONS = 4  # standard deviations of the number of words that a block takes, read beyond their mean
_PIECE = 1 << 12  # outputs read at once, whose words and gaps stay in a core's cache

Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]


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


class _Gaps(NamedTuple):
    """How words become gaps, for one probability of an entry to be drawn.

    Attributes:
        thresholds: T_1 .. T_L, uint32: a word u gives the smallest gap g with u < T_g; where there is none, L entries
            are passed and none is drawn.
        table: (65,536,), uint16: the gap of every word with that upper half, L + 1 where none is drawn, and 0 where its
            words have more than one.
        mean, variance: of the entries that one word passes.
    """

    thresholds: UInt32Array
    table: npt.NDArray[np.uint16]
    mean: float
    variance: float

    def steps(self, words: UInt32Array) -> npt.NDArray[np.uint16]:
        """The gap of every word, L + 1 where none is drawn."""
        gaps = self.table.take((words >> _SHIFT).astype(np.uint16), mode="clip")
        (several,) = (gaps == 0).nonzero()
        if len(several):
            gaps[several] = self.thresholds.searchsorted(words[several], side="right") + 1
        return gaps

    def words_for(self, entries: int) -> int:
        """How many words pass so many entries, nearly always."""
        mean = entries / self.mean
        return ceil(mean + _DEVIATIONS * sqrt(mean * self.variance) / self.mean + 1)


@lru_cache(maxsize=64)
def _gaps(drawn: Fraction) -> _Gaps:
    """The gaps of entries that are drawn with that probability, in (0, 1/2].

    P(gap > g) is (1 - drawn)**g: S_0 = 2**128, S_g = floor(S_{g-1} (1 - drawn)), T_g = floor((2**128 - S_g) / 2**96).
    L is the first g at which T_g = 2**32 - 1, and at most 4,096. A threshold is less than 2**-32 too low, which changes
    the share of drawn entries by less than one part in 10**7, or at a share of 10**-7 in 10**6.
    """
    a, c, left = drawn.denominator - drawn.numerator, drawn.denominator, _UNIT
    thresholds: list[int] = []
    while len(thresholds) < _LONGEST and (not thresholds or thresholds[-1] < 2**32 - 1):
        left = left * a // c
        thresholds.append((_UNIT - left) >> 96)
    limits = np.array(thresholds, dtype=np.uint32)
    first = np.arange(_CELLS, dtype=np.uint32) << _SHIFT
    table = np.searchsorted(limits, first, side="right") + 1
    table[table != np.searchsorted(limits, first + np.uint32(_CELLS - 1), side="right") + 1] = 0
    beyond = 1 - np.concatenate([[0.0], limits.astype(np.float64) / 2**32])  # P(gap > 0) .. P(gap > L)
    mean = float(beyond[:-1].sum())
    square = float(((2 * np.arange(len(limits)) + 1) * beyond[:-1]).sum())
    return _Gaps(limits, table.astype(np.uint16), mean, square - mean**2)


class _Words:
    """The raw words of numpy's Philox-4x64-10, from any output on; not for several threads at once."""

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)
        self._state: Any = dict(self._generator.state, buffer_pos=_WORDS // 2)  # nothing is left over

    def seek(self, key: tuple[int, int], counter: int) -> None:
        """Go to the output of ``counter + 1``: the generator steps its counter before it generates."""
        low, high = key
        inner = self._state["state"]
        inner["key"][:] = low | high << 32, 0
        inner["counter"][:] = counter & _MASK64, counter >> 64, 0, 0
        self._generator.state = self._state

    def read(self, outputs: int) -> UInt32Array:
        """The words of the next outputs, eight each, lowest first."""
        raw = self._generator.random_raw(_WORDS // 2 * outputs)
        return raw.astype("<u8", copy=False).view("<u4").astype(np.uint32, copy=False)


class _Draw:
    """Draws the kept positions of tensors, one after the other."""

    def __init__(self, keep: Fraction) -> None:
        self._gaps = None if keep == 1 else _gaps(min(keep, 1 - keep))  # None keeps everything
        self._inverted, self._words = keep > Fraction(1, 2), _Words()

    def kept(self, name: str, numel: int, seed: int, start: int, stop: int) -> Int64Array:
        """The kept flat positions of a tensor in [start, stop), sorted."""
        key = stream_key(name, seed)
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"positions [{start}, {stop}) are not inside a tensor of {numel} entries")
        if self._gaps is None:
            return np.arange(start, stop, dtype=np.int64)
        blocks = range(start // BLOCK, -(-stop // BLOCK))
        found = _joined([self._in_block(key, block, numel, self._gaps) for block in blocks])
        if (start, stop) == (0, numel):
            return found
        return found[found.searchsorted(start) : found.searchsorted(stop)]

    def _in_block(self, key: tuple[int, int], block: int, numel: int, gaps: _Gaps) -> Int64Array:
        """The kept positions of a tensor in one block, ascending."""
        first, size = block * BLOCK, min(BLOCK, numel - block * BLOCK)
        self._words.seek(key, block << 64)
        if not self._inverted:
            return self._drawn(size, first, gaps)
        marks = np.ones(size, dtype=np.bool_)
        marks[self._drawn(size, 0, gaps)] = False
        return np.flatnonzero(marks) + first

    def _drawn(self, size: int, first: int, gaps: _Gaps) -> Int64Array:
        """The positions that the words draw of so many entries, ascending, counted from ``first``."""
        longest, passed, pieces = len(gaps.thresholds), 0, []
        while passed < size:
            steps = gaps.steps(self._words.read(min(-(-gaps.words_for(size - passed) // _WORDS), _PIECE)))
            beyond = int(steps.max()) > longest
            ends = (np.minimum(steps, longest) if beyond else steps).cumsum(dtype=np.uint32)
            last = int(ends[-1])
            if beyond:
                ends = ends[steps <= longest]
            if passed + last > size:
                ends = ends[: ends.searchsorted(size - passed, side="right")]
            pieces.append(np.add(ends, first + passed - 1, dtype=np.int64))
            passed += last
        return _joined(pieces)


def _joined(pieces: list[Int64Array]) -> Int64Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, np.int64), *pieces])


def kept_positions_of(tensors: Iterable[tuple[str, int]], pruning_rate: float, seed: int) -> Iterator[Int64Array]:
    """The kept positions of every tensor, in order, as :func:`kept_positions` gives them for one.

    Memory holds the kept positions of one tensor.

    Args:
        tensors: canonical name and number of entries of every tensor, read as they are needed.
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
    draw = _Draw(keep)
    return (draw.kept(name, numel, seed, 0, numel) for name, numel in tensors)


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
    return _Draw(keep).kept(name, numel, seed, start, numel if stop is None else stop)


def uniform_words(name: str, seed: int, start: int, stop: int, stream: str = "importance") -> UInt32Array:
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
    key = stream_key(name, seed, stream)
    if not 0 <= start <= stop:
        raise ValueError(f"positions [{start}, {stop}) are no range: expected 0 <= start <= stop")
    first = start // _WORDS
    words = _Words()
    words.seek(key, first)
    return words.read(-(-stop // _WORDS) - first)[start - first * _WORDS : stop - first * _WORDS]
