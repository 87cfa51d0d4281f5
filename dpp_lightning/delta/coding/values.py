"""Kept values to bytes and back: planes of bytes, integers with scales, or signs where magnitudes are equal.

A float is rotated left by one bit, which brings its exponent into bytes of its own, and cut into planes: the exponents
of a delta's values lie close together, so the first plane goes into few bits, the others are stored as they are.
``signs``: where most values of a tensor share one magnitude (as after importance sampling) it is stored once, with one
bit a value, and the others beside it in full; lossless. Integers are bytes or halves of bytes, with one bfloat16 scale
per group; the entropy coder makes few bits of the smaller ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpp_lightning.delta.coding.positions import ByteArray
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, dequantize, quantize
from dpp_lightning.tensors.finite import is_finite

UnsignedArray = npt.NDArray[Any]  # of unsigned integers as wide as the floats


_HALVES = {name for name, (largest, _) in INTEGERS.items() if largest < 8}  # of a byte
PLANES, SIGNS = 0, 1  # forms of the float types; integers have one form
_SAMPLE = 127  # values that are looked at to find a tensor's usual magnitude
_EQUAL_SHARE = 0.5  # of the values must have their tensor's usual magnitude for the form with signs


def encode_values(values: list[Tensor], dtype: str) -> tuple[int, list[ByteArray]]:
    """The kept values of consecutive tensors as (form, streams of bytes); each is of shape (kept >= 1,), all of one
    dtype."""
    if dtype in INTEGERS:
        quantized = [quantize(v, dtype) for v in values]
        integers, scales = (torch.cat(tensors) for tensors in zip(*quantized, strict=True))
        held = _nibbles(integers) if dtype in _HALVES else integers.numpy().view(np.uint8)
        return PLANES, [held, *_planes(_bits(scales))]
    together = _bits(torch.cat(values))
    magnitude = (1 << (8 * together.itemsize - 1)) - 1
    usual = np.array([_usual(_bits(v) & magnitude) for v in values], dtype=together.dtype)
    differs = (together & magnitude) != np.repeat(usual, [v.numel() for v in values])
    others = int(np.count_nonzero(differs))
    if others > (1 - _EQUAL_SHARE) * together.size:
        return PLANES, _planes(together)
    same = together[~differs] if others else together
    flags = [np.packbits(bits, bitorder="little") for bits in (same > magnitude, differs)]
    return SIGNS, [*flags, *_planes(usual), *_planes(together[differs])]


def stream_count(dtype: str, form: int) -> int:
    """How many streams :func:`encode_values` makes."""
    if dtype in INTEGERS:
        return 3
    size = FLOATS[dtype].itemsize
    return 2 + 2 * size if form == SIGNS else size


def decode_values(dtype: str, form: int, streams: list[ByteArray], counts: list[int]) -> Tensor:
    """The inverse of :func:`encode_values`, given how many values, one at least, every tensor has.

    Returns:
        All values, shape (sum of counts,), in their float dtype; float32 for integers.

    Raises:
        ValueError: streams of other lengths than these values have, or values that are not finite.
    """
    kept = sum(counts)
    if dtype in INTEGERS and form == PLANES:
        stored = (kept + 1) // 2 if dtype in _HALVES else kept
        _check_lengths(streams, [stored, *[sum(-(-c // INTEGERS[dtype][1]) for c in counts)] * 2])
        held = _from_nibbles(streams[0], kept) if dtype in _HALVES else streams[0].copy().view(np.int8)
        integers = torch.from_numpy(held)
        if kept and not -INTEGERS[dtype][0] <= int(integers.min()) <= int(integers.max()) <= INTEGERS[dtype][0]:
            raise ValueError(f"values of {dtype} beyond {INTEGERS[dtype][0]}")
        scales = _floats(_joined(streams[1:], "bfloat16"), "bfloat16")
        groups = [-(-c // INTEGERS[dtype][1]) for c in counts]
        pairs = zip(integers.split(counts), scales.split(groups), strict=True)
        values = torch.cat([dequantize(i, s, dtype) for i, s in pairs])
        if not is_finite(values):
            raise ValueError(f"values of {dtype} that are not finite")
        return values
    if dtype in INTEGERS:
        raise ValueError(f"{dtype} has no form {form}")
    if form == SIGNS:
        return _floats(_with_signs(dtype, streams, counts), dtype)
    _check_lengths(streams, [kept] * len(streams))
    return _floats(_joined(streams, dtype), dtype)


def _nibbles(integers: Tensor) -> ByteArray:
    """Numbers in [-8, 7] two to a byte, the first in the low half; a byte is then nearly a symbol of its own, for
    which the entropy coder is closer to the entropy than for one number."""
    halves = np.zeros(-(-integers.numel() // 2) * 2, dtype=np.uint8)
    halves[: integers.numel()] = integers.numpy().view(np.uint8) & 15
    packed: ByteArray = halves[::2] | np.left_shift(halves[1::2], np.uint8(4))
    return packed


def _from_nibbles(stored: ByteArray, count: int) -> npt.NDArray[np.int8]:
    """The inverse of :func:`_nibbles`."""
    halves = np.empty(2 * len(stored), dtype=np.uint8)
    halves[::2], halves[1::2] = stored & 15, stored >> 4
    if halves[count:].any():
        raise ValueError("half a byte behind the last value that is not 0")
    return ((halves[:count] ^ 8).astype(np.int16) - 8).astype(np.int8)


def _with_signs(dtype: str, streams: list[ByteArray], counts: list[int]) -> UnsignedArray:
    kept, size = sum(counts), FLOATS[dtype].itemsize
    if len(streams[1]) != (kept + 7) // 8:
        raise ValueError(f"{len(streams[1])} bytes of flags for {kept} values")
    differs = np.unpackbits(streams[1], count=kept, bitorder="little").view(np.bool_)
    others = int(np.count_nonzero(differs))
    _check_lengths(streams, [(kept - others + 7) // 8, (kept + 7) // 8, *[len(counts)] * size, *[others] * size])
    signs = np.unpackbits(streams[0], count=kept - others, bitorder="little")
    bits = np.repeat(_joined(streams[2 : 2 + size], dtype), counts)
    negative = signs.astype(bits.dtype) << (8 * size - 1)
    if others:
        bits[~differs] |= negative
        bits[differs] = _joined(streams[2 + size :], dtype)
        return bits
    return bits | negative


def _usual(magnitudes: UnsignedArray) -> int:
    """The median of some of them, evenly spread: the magnitude that most share, if there is one."""
    some = magnitudes[:: -(-magnitudes.size // _SAMPLE)]
    return int(np.partition(some, some.size // 2)[some.size // 2])


def _bits(values: Tensor) -> UnsignedArray:
    """The bits of floats as unsigned numbers, shape (kept,)."""
    bits: UnsignedArray = values.contiguous().view(torch.uint8).numpy().view(f"<u{values.element_size()}")
    return bits


def _floats(bits: UnsignedArray, dtype: str) -> Tensor:
    return torch.from_numpy(bits.view(np.uint8)).view(FLOATS[dtype])


def _planes(bits: UnsignedArray) -> list[ByteArray]:
    """The bytes of floats' bits, rotated, plane by plane, the exponents' first."""
    size = bits.itemsize
    rotated = (bits << 1) | (bits >> (8 * size - 1))
    split = rotated.view(np.uint8).reshape(-1, size)
    return [np.ascontiguousarray(split[:, j]) for j in reversed(range(size))]


def _joined(planes: list[ByteArray], dtype: str) -> UnsignedArray:
    """The inverse of :func:`_planes`.

    Raises:
        ValueError: floats that are not finite: their exponent, which begins the first plane, is all ones.
    """
    largest = planes[0] >= (0xF8 if dtype == "float16" else 0xFF)
    if dtype == "float64":  # its exponent goes on in the second plane
        largest &= planes[1] >= 0xE0
    if largest.any():
        raise ValueError("kept values that are not finite")
    size = len(planes)
    rotated = planes[-1].astype(f"<u{size}")
    for j, plane in enumerate(planes[:-1]):
        rotated |= plane.astype(rotated.dtype) << (8 * (size - 1 - j))
    return (rotated >> 1) | (rotated << (8 * size - 1))


def _check_lengths(streams: list[ByteArray], expected: list[int]) -> None:
    got = [len(s) for s in streams]
    if got != expected:
        raise ValueError(f"streams of {got} bytes where these values have {expected}")
