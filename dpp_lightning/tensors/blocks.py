"""Numbered blocks of a model, and the linear maps inside them, by the names and shapes of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")


def block_of(name: str) -> str | None:
    """The numbered block a tensor belongs to, such as ``encoder.layer.7.``; None for a tensor outside them."""
    match = _BLOCK.search(name)
    return name[: match.end()] if match else None


def is_linear_map(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is the weight of a linear map inside a numbered block, judged by its name and shape alone."""
    return block_of(name) is not None and name.endswith(".weight") and len(shape) == 2
