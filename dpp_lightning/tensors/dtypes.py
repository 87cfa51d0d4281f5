"""Dtypes of kept values: the floats and integers that a file may hold, and values cast to them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_dtype(values: Tensor, dtype: str | None, like: Tensor, name: str) -> Tensor:
    """Kept values as the file can hold them: a float of at most 32 bits; those of int8 and int4 are float32.

    Raises:
        ValueError: values that are not finite then.
    """
    if dtype in INTEGERS:
        cast = quantised(values, dtype)
    else:
        own = like.dtype if like.dtype in FLOATS.values() else torch.float32
        cast = values.to(FLOATS[dtype] if dtype else own)
    if not bool(torch.isfinite(cast).all()):
        raise ValueError(
            f"{name}: kept values are not finite in {dtype or cast.dtype}; check the weights or choose a wider dtype"
        )
    return cast


FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


INTEGERS = {"int8": (127, 128), "int4": (7, 32)}  # largest magnitude, entries a scale


DTYPES = (*FLOATS, *INTEGERS)  # their numbers in the file are their places here: append, never reorder


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that values cannot be held in; None stands for their own.

    Raises:
        ValueError: with those that are known.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype of the kept values must be one of {', '.join(DTYPES)}, got {dtype!r}")


def quantised(values: Tensor, dtype: str) -> Tensor:
    """The values that ``int8`` or ``int4`` can hold nearest to the given ones, float32 (shape (kept,))."""
    integers, scales = _integers(values.float(), dtype)
    return _dequantised(integers, scales, dtype)


def _integers(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """One tensor's values as int8 numbers and a bfloat16 scale per group; coding the decoded again changes nothing."""
    top, group = INTEGERS[dtype]
    rows = torch.nn.functional.pad(values.float(), (0, -values.numel() % group)).view(-1, group)
    scales = (rows.abs().amax(1) / top).bfloat16() if rows.numel() else values.new_empty(0, dtype=torch.bfloat16)
    divisor = torch.where(scales == 0, 1, scales.float())
    integers = torch.round(rows / divisor[:, None]).clamp(-top, top).to(torch.int8)
    return integers.view(-1)[: values.numel()], scales


def _dequantised(integers: Tensor, scales: Tensor, dtype: str) -> Tensor:
    return integers.float() * scales.float().repeat_interleave(INTEGERS[dtype][1])[: integers.numel()]
