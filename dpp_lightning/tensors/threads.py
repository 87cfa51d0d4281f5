"""Work on many tensors shared out over threads, where it waits for memory and not for Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
_WORTH = 1 << 18  # below that much work starting a thread costs more than it saves


def over_threads(work: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """``work(name)`` for every name, as a dict in their order; in torch's number of threads if there is enough to do.

    Args:
        work: reads and writes nothing that the others write.
        sizes: name to the amount of work, such as kept entries.
    """
    workers = min(torch.get_num_threads(), len(sizes))
    total, done = sum(sizes.values()), 0
    if workers < 2 or total < _WORTH:
        return in_order(work, sizes)
    shares: list[list[str]] = [[] for _ in range(workers)]
    for name, size in sizes.items():
        shares[min(done * workers // total, workers - 1)].append(name)
        done += size
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(lambda names: [(name, work(name)) for name in names], shares))
    return {name: result for part in parts for name, result in part}


def in_order(work: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """``work(name)`` for every name, one after the other."""
    return {name: work(name) for name in sizes}
