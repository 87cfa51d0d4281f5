"""Putting back what was changed for a time, whatever ends that time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def restored_after(restore: Callable[[], None]) -> Iterator[None]:
    """``restore`` after the block, also after an exception, and once more if it was interrupted itself.

    Args:
        restore: puts everything back and may be called again: a second call does what the first did not, or nothing.
    """
    try:
        try:
            yield
        finally:
            restore()
    finally:
        restore()
