"""Dtypes of kept values: the floats and integers that a delta file may hold, and values cast to them."""

from __future__ import annotations

import torch
from torch import Tensor

from dpp_lightning.tensors.finite import is_finite

FLOATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
INTEGERS = {  # largest magnitude, entries that share a scale
    "int8": (127, 128),
    "int4": (7, 32),
    "int3": (3, 128),
    "int2": (2, 128),
}
_LEAST_SCALE = torch.finfo(torch.bfloat16).smallest_normal  # below it scales lose their precision: 0 is nearer
# a delta file stores a dtype by its index in this tuple: append, never reorder
DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "float64", "int3", "int2")


def check_dtype(dtype: str | None) -> None:
    """Check the name of a dtype for kept values; None stands for the dtype that the values have.

    Raises:
        ValueError: the name is none of ``DTYPES``; the message lists them.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype of the kept values must be one of {', '.join(DTYPES)}, got {dtype!r}")


def to_dtype(values: Tensor, dtype: str | None, like: Tensor, name: str) -> Tensor:
    """Kept values cast to what a delta file can hold.

    Args:
        values: shape (kept,), any float dtype.
        dtype: one of ``DTYPES``; None for the dtype of ``like``, or float32 where that is wider than 32 bits.
        like: the fine-tuned tensor that the values belong to.
        name: the tensor's name, for the message.

    Returns:
        Values of shape (kept,) in the float dtype; for integers the nearest values on their grid, in float32.

    Raises:
        ValueError: a value is not finite after the cast, for example 1e5 in float16.
    """
    if dtype in INTEGERS:
        cast = fake_quantize(values, dtype)
    else:
        default = like.dtype if like.dtype in FLOATS.values() and like.dtype.itemsize <= 4 else torch.float32
        cast = values.to(FLOATS[dtype] if dtype else default)
    if not is_finite(cast):
        raise ValueError(
            f"{name}: kept values are not finite in {dtype or cast.dtype}; check the weights or choose a wider dtype"
        )
    return cast


def exact_dtype(base: torch.dtype, finetuned: torch.dtype) -> str:
    """The dtype in which the difference of two values is exact, unless the one is 2^29 times the other or more.

    Args:
        base, finetuned: dtypes of the values.
    """
    return "float32" if base == finetuned and base.itemsize <= 2 else "float64"


def fake_quantize(values: Tensor, dtype: str) -> Tensor:
    """The values that a file of an integer dtype holds, as float32 of the same shape (kept,); see :func:`quantize`."""
    integers, scales = quantize(values, dtype)
    return dequantize(integers, scales, dtype)


def quantize(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """One tensor's values as integers with a scale for each group of consecutive values.

    The largest magnitude of a group is its scale times the largest integer, and the others are rounded to the nearest
    multiple of the scale. Coded near their entropy, the integers of normally distributed values take 3.9 bits each in
    ``int4``, 2.3 in ``int3`` and 1.8 in ``int2``, with a mean squared error of 1, 7 and 15 % of their variance.

    Quantizing dequantized values again gives the same integers and scales.

    Args:
        values: shape (kept,), any float dtype.
        dtype: a key of ``INTEGERS``.

    Returns:
        Integers of shape (kept,) in int8, from minus the dtype's largest magnitude to it; scales of shape (groups,) in
        bfloat16.
    """
    largest, group_size = INTEGERS[dtype]
    rows = torch.nn.functional.pad(values.float(), (0, -values.numel() % group_size)).view(-1, group_size)
    scales = (rows.abs().amax(1) / largest).bfloat16() if rows.numel() else values.new_empty(0, dtype=torch.bfloat16)
    scales = torch.where(scales < _LEAST_SCALE, 0, scales)  # NaN stays
    divisor = torch.where(scales == 0, 1, scales.float())
    integers = torch.round(rows / divisor[:, None]).clamp(-largest, largest).to(torch.int8)
    return integers.view(-1)[: values.numel()], scales


def dequantize(integers: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """The float32 values, shape (kept,), that :func:`quantize` made these integers and scales of."""
    return integers.float() * scales.float().repeat_interleave(INTEGERS[dtype][1])[: integers.numel()]
