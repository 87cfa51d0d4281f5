"""Locks of models and deltas, so that threads that share one take turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.names import TensorSource

_serials = count()
# A module or delta to its lock, and the number by which locks are ordered.
_locks: WeakKeyDictionary[object, tuple[int, Any]] = WeakKeyDictionary()


@contextmanager
def locked(things: Iterable[object]) -> Iterator[None]:
    """Hold the lock of each of these objects for the block; a thread that holds them already goes on.

    Locks are taken in one order, that of their making, so two threads that ask for the same objects cannot wait for
    each other. A thread that asks for further objects inside the block can.

    Args:
        things: modules and deltas, hashed by identity.
    """
    found = dict(_locks.get(thing) or _locks.setdefault(thing, (next(_serials), RLock())) for thing in things)
    held: list[Any] = []

    def release() -> None:
        while held:
            held.pop().release()

    with restored_after(release):
        for serial in sorted(found):
            held.append(found[serial].acquire() and found[serial])  # in one line, so that no interrupt comes between
        yield


def modules_of(target: TensorSource) -> list[nn.Module]:
    """A model and all modules in it, of which two threads have some in common if they share a part; none of a state
    dict, which cannot be locked.

    Not its tensors: while one has a weak reference, torch cannot swap it, as FSDP and ``Module.to`` do.
    """
    return list(target.modules()) if isinstance(target, nn.Module) else []
