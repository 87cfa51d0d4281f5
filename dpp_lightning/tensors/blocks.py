"""Numbered blocks of a model, and the linear maps inside them, by the names and shapes of tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")


def block_of(name: str) -> str | None:
    """The numbered block a tensor belongs to, ``encoder.layer.7.`` for example; None outside the blocks."""
    found = _BLOCK.search(name)
    return name[: found.end()] if found else None


def is_linear_map(name: str, shape: Sequence[int]) -> bool:
    """The weight of a linear map inside the numbered blocks, by name and shape."""
    return block_of(name) is not None and name.endswith(".weight") and len(shape) == 2
