"""Work on many tensors, shared among threads: it waits for memory, during which Python runs the other threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TypeVar

import torch

Result = TypeVar("Result")
_MIN_WORK = 1 << 18  # entries; below that, starting a thread costs more than it saves


def over_threads(work: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """``work(name)`` for every name, in as many threads as torch uses; in the calling thread if there is little to do.

    After an error or an interrupt no call is going on, and none begins.

    Args:
        work: called once a name; calls must not read or write what another call writes.
        sizes: name to the amount of work in entries, by which the names are divided into consecutive equal shares.

    Returns:
        Name to result, in the order of ``sizes``.
    """
    workers = min(torch.get_num_threads(), len(sizes))
    total, assigned = sum(sizes.values()), 0
    if workers < 2 or total < _MIN_WORK:
        return in_order(work, sizes)
    shares: list[list[str]] = [[] for _ in range(workers)]
    for name, size in sizes.items():
        shares[min(assigned * workers // total, workers - 1)].append(name)
        assigned += size
    locks, stopped = [Lock() for _ in shares], Event()

    def run(names: list[str], lock: Lock) -> list[tuple[str, Result]]:
        results = []
        for name in names:
            with lock:
                if stopped.is_set():
                    break
                results.append((name, work(name)))
        return results

    try:
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(run, shares, locks))
    except BaseException:  # an interrupt may leave a thread behind that the pool does not know yet
        stopped.set()
        for lock in locks:
            with lock:
                pass
        raise
    return {name: result for share in done for name, result in share}


def in_order(work: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """``work(name)`` for every name, one after another in the calling thread, as collectives need it."""
    return {name: work(name) for name in sizes}
