"""Many requests, each for a delta: grouped by delta or mixed within batches, whichever is faster, in their order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from dpp_lightning.serving.sparse_products import CannotMixError

Request = TypeVar("Request")
Result = TypeVar("Result")
Forward = Callable[[nn.Module, list[Request]], Sequence[Result]]

_SAMPLE = 4  # deltas that the two ways are timed with
_SIZES = (1, 2, 4, 8, 16)  # requests of each delta that they are timed with

_log = logging.getLogger(__name__)


class Pool(Protocol):
    """What is needed of a :class:`dpp_lightning.serving.delta_pool.DeltaPool`."""

    def use(self, name: str | None) -> AbstractContextManager[nn.Module]:
        """The model with one delta."""

    def mixed(self, names: Sequence[str | None]) -> AbstractContextManager[nn.Module]:
        """The model with one delta a row."""

    def shapes(self, name: str | None) -> Hashable:
        """What is equal for deltas that a batch can have together."""

    def alone(self) -> AbstractContextManager[None]:
        """Without other threads."""


class RequestMap:
    """Divides requests into forwards. What it measures of a pool it remembers.

    Args:
        pool: whose deltas they are for.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._most_mixed: int | None = None  # requests of one delta up to which mixing is faster
        self._shapes: dict[str | None, Hashable] = {}

    def run(
        self,
        requests: Sequence[Request],
        names: Sequence[str | None],
        forward: Forward[Request, Result],
        batch_size: int,
        mix_up_to: int | None,
    ) -> list[Result]:
        """As :meth:`dpp_lightning.serving.delta_pool.DeltaPool.map`; ``names`` are of each request its delta."""
        by_name: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            by_name.setdefault(name, []).append(place)
        answers = _Answers(requests, forward)
        if mix_up_to is None and len(by_name) > 1:
            first = {name: requests[places[0]] for name, places in list(by_name.items())[:_SAMPLE]}
            mix_up_to = self._measured(first, forward)
        mixable: dict[Hashable, list[int]] = {}
        for name, places in by_name.items():
            if len(by_name) > 1 and len(places) <= (mix_up_to or 0):
                mixable.setdefault(self._shapes_of(name), []).extend(places)
            else:
                self._grouped(answers, places, name, batch_size)
        for places in mixable.values():
            for chunk in _chunks(places, batch_size):
                self._mixed(answers, chunk, names)
        return [answers.of[place] for place in range(len(requests))]

    def _mixed(self, answers: _Answers[Any, Any], places: list[int], names: Sequence[str | None]) -> None:
        """One batch of several deltas; one batch for each of them where they cannot be mixed."""
        of_rows = [names[place] for place in places]
        distinct = list(dict.fromkeys(of_rows))
        if len(distinct) > 1:
            try:
                with self._pool.mixed(of_rows) as model:
                    return answers.add(model, places)
            except Exception as error:  # of the forward itself it comes again
                _say("requests for %d deltas are grouped: %s", error, len(distinct))
        for name in distinct:
            self._grouped(answers, [p for p in places if names[p] == name], name, len(places))
        return None

    def _grouped(self, answers: _Answers[Any, Any], places: list[int], name: str | None, batch_size: int) -> None:
        for chunk in _chunks(places, batch_size):
            with self._pool.use(name) as model:
                answers.add(model, chunk)

    def _shapes_of(self, name: str | None) -> Hashable:
        if name not in self._shapes:
            self._shapes[name] = self._pool.shapes(name)
        return self._shapes[name]

    def _measured(self, requests: dict[str | None, Request], forward: Forward[Request, Any]) -> int:
        """Up to how many requests of each delta mixing is faster, timed once; 0 where it never is, or cannot be.

        Args:
            requests: one of each of some deltas.
        """
        if self._most_mixed is None:
            fitting = [name for name in requests if self._shapes_of(name) == self._shapes_of(next(iter(requests)))]
            if len(fitting) < 2:
                return max(_SIZES)  # nothing to measure with: what can be mixed will be
            with self._pool.alone():
                self._most_mixed = self._timed(fitting, requests, forward)
        return self._most_mixed

    def _timed(
        self, names: list[str | None], requests: dict[str | None, Request], forward: Forward[Request, Any]
    ) -> int:
        most = 0
        try:
            self._time(names, requests, forward, 1)  # reads the deltas and warms up
            for size in _SIZES:
                mixed, grouped = self._time(names, requests, forward, size)
                if mixed > grouped:
                    break
                most = size
        except Exception as error:  # of the forward itself it comes again
            _say("requests are grouped by delta, as they cannot be mixed: %s", error)
        return most

    def _time(
        self, names: list[str | None], requests: dict[str | None, Request], forward: Forward[Request, Any], size: int
    ) -> tuple[float, float]:
        """Seconds of one mixed batch, and of a batch for each delta."""
        begin = perf_counter()
        with self._pool.mixed([name for name in names for _ in range(size)]) as model:
            forward(model, [requests[name] for name in names for _ in range(size)])
        middle = perf_counter()
        for name in names:
            with self._pool.use(name) as model:
                forward(model, [requests[name]] * size)
        return middle - begin, perf_counter() - middle


def _say(text: str, error: Exception, *counts: int) -> None:
    """Log why requests are not mixed; what was not foreseen as a warning."""
    level = logging.INFO if isinstance(error, CannotMixError | MemoryError) else logging.WARNING
    _log.log(level, text, *counts, f"{type(error).__name__}: {error}")


class _Answers(Generic[Request, Result]):
    """The results of requests, by their places.

    Args:
        requests: all of them.
        forward: gives one result for each of some requests.
    """

    def __init__(self, requests: Sequence[Request], forward: Forward[Request, Result]) -> None:
        self._requests, self._forward = requests, forward
        self.of: dict[int, Result] = {}

    def add(self, model: nn.Module, places: list[int]) -> None:
        """Run the forward for the requests at some places."""
        results = self._forward(model, [self._requests[place] for place in places])
        if len(results) != len(places):
            raise ValueError(f"forward gave {len(results)} results for {len(places)} requests: it gives one for each")
        self.of.update(zip(places, results, strict=True))


def _chunks(places: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]
