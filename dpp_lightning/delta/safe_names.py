"""Names and texts of delta files that are safe to print and, of tensors, to use as a part of a path."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # nor turn the line around


def is_printable(text: str) -> bool:
    """Whether a text has no control characters, none that turn a line around, and no half characters (surrogates)."""
    return _UNPRINTABLE.search(text) is None


def check_name(name: str) -> str:
    """A tensor's name as it is, if it is safe to print and, should anyone use it so, as a part of a path.

    Raises:
        ValueError: control characters, half characters (surrogates), a leading ``/`` or a part ``..``.
    """
    parts = name.replace("\\", "/").split("/")
    if not is_printable(name) or ".." in parts or (len(parts) > 1 and not parts[0]):
        raise ValueError(f"a tensor cannot be named {name!r}: no control characters, leading '/' or parts '..' there")
    return name
