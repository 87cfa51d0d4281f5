"""What the first rank decides, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def computed_on_first(compute: Callable[[], T], broadcast: Callable[[Any], Any], *, is_first: bool) -> T:
    """What the first rank computes, on all ranks, which must call; or the error that it raises, so that none is left.

    Args:
        compute: called on the first rank alone; result and errors can be pickled.
        broadcast: gives the first rank's value on all ranks.
        is_first: whether this is the first rank.

    Raises:
        Exception: the one that ``compute`` raises.
    """
    outcome: tuple[T | None, Exception | None] | None = None
    if is_first:
        try:
            outcome = compute(), None
        except Exception as error:
            outcome = None, error
    value, raised = broadcast(outcome)
    if raised is not None:
        raise raised
    result: T = value
    return result
