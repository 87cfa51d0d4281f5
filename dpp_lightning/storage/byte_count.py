"""A number of bytes as people write it: 50000, 50kB, 2 GB."""

from __future__ import annotations

import re

_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)\s*((?P<prefix>[kKMG])(?P<binary>i)?)?[bB]?")


def number_of_bytes(text: str, argument: str) -> int:
    """A number of bytes, as 50000, 50kB, 0.24MB, 48KiB or 2 GB.

    Args:
        text: what the user wrote.
        argument: what it was written for, for the message.

    Raises:
        ValueError: any other text.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{argument} is a number of bytes such as 50000, 50kB, 0.24MB or 48KiB, got {text!r}")
    prefix, binary = (match["prefix"] or "").upper(), bool(match["binary"])
    return int(float(match["number"]) * (1024 if binary else 1000) ** ("KMG".index(prefix) + 1 if prefix else 0))
