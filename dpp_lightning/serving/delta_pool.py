"""DeltaPool: many deltas of one base in one process, each swapped in while it is used, the base exact in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from dpp_lightning.delta.config_file import CONFIG_FILE, read_config
from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.delta.locks import locked, modules_of
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.serving.base_guard import BaseGuard
from dpp_lightning.serving.batch_rows import BatchRows
from dpp_lightning.serving.bound_delta import BoundDelta, Undo
from dpp_lightning.serving.mixed_batch import MixedBatch
from dpp_lightning.serving.request_map import RequestMap
from dpp_lightning.storage.byte_count import number_of_bytes
from dpp_lightning.storage.locate import few_names, local_folder
from dpp_lightning.storage.model_folder import delta_side_files
from dpp_lightning.storage.source_kind import check_delta
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.names import describe_source

if TYPE_CHECKING:
    from dpp_lightning.serving.delta_pipeline import DeltaPipeline

Request = TypeVar("Request")
Result = TypeVar("Result")

_TASK = "@"  # between the name of a merged delta and one of its tasks


@dataclass(frozen=True)
class PoolStats:
    """What a pool has done so far.

    Attributes:
        hits: uses of a delta whose values were in memory.
        loads: deltas read and checked against the base.
        evictions: deltas whose values were dropped to make room.
        swaps: times that a delta was written into the model and taken off again.
        swap_ms: milliseconds of a swap, both ways together, in the mean; 0 before the first.
        load_ms: milliseconds of a load in the mean; 0 before the first.
        num_bytes: bytes of all values in memory.
        memory: most bytes that they may have.
        loaded: names of the deltas in memory, the least recently used first.
    """

    hits: int
    loads: int
    evictions: int
    swaps: int
    swap_ms: float
    load_ms: float
    num_bytes: int
    memory: int
    loaded: tuple[str, ...]


@dataclass
class _Source:
    """Where a delta of the pool comes from."""

    delta: SparseDelta | str | Path
    info: DeltaInfo
    revision: str | None
    force: bool

    def read(self) -> SparseDelta:
        if isinstance(self.delta, SparseDelta):
            return self.delta
        return SparseDelta.from_pretrained(self.delta, revision=self.revision)


class PoolMemoryError(ValueError, MemoryError):
    """Deltas that are needed at once have more bytes than a pool may have."""


class DeltaPool:
    """Many deltas of one base, over one model that holds the base.

    A delta's values are read on first use. While those in memory have more bytes than ``memory``, the least recently
    used are dropped. Between two uses the model is the base, bit for bit.

    Threads may share a pool. ``use`` and ``mixed`` hold a lock until their block ends, so a forward inside the block
    never sees another delta's weights; a forward outside of any block is not guarded. ``SparseDelta.apply_`` and its
    like on the same model wait for the same lock.

    Args:
        model: a module on one device, or on several, whose tensors are whole: the base. It belongs to the pool for as
            long as the pool is used, and its weights must not be changed meanwhile.
        memory: most bytes of deltas in memory, such as ``"2 GB"`` or 500_000_000.

    Raises:
        ValueError: a model with quantised weights or with tensors in shards, or a text that is no number of bytes.
    """

    def __init__(self, model: nn.Module, memory: str | int = "2 GB") -> None:
        self.model = model
        self.memory = memory if isinstance(memory, int) else number_of_bytes(memory, "memory")
        self._guard = BaseGuard(model)
        self._modules = modules_of(model)
        self._sources: dict[str, _Source] = {}
        self._loaded: dict[str, BoundDelta] = {}  # the least recently used first
        self._undo: Undo = []
        self._batch_first: set[str] = set()
        self._requests = RequestMap(self)
        self._in_use = False
        self._hits = self._loads = self._evictions = self._swaps = 0
        self._swap_seconds = self._load_seconds = 0.0

    def __repr__(self) -> str:
        """The base and how many deltas there are, in one line."""
        count = f"{len(self._sources)} deltas, {len(self._loaded)} in memory"
        return f"DeltaPool({describe_source(self.model)}, {count}, {self.stats().num_bytes:,} of {self.memory:,} bytes)"

    @property
    def names(self) -> list[str]:
        """What :meth:`use` takes; a merged delta stands there once for each of its tasks, as ``NAME@TASK``."""
        return [full for name, source in self._sources.items() for full in _full_names(name, source.info)]

    def add(
        self, name: str, delta: SparseDelta | str | Path, *, revision: str | None = None, force: bool = False
    ) -> None:
        """Make a delta known. Of a folder or hub id only the description is read.

        Args:
            name: what it is called from now on.
            delta: a folder, a hub id, or a delta in memory, which stays there whatever the pool drops.
            revision: branch, tag or commit of a hub id.
            force: use it although the model is not its base.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: a name that is taken, empty or has an ``@``; a description that is damaged.
        """
        if not name or _TASK in name:
            raise ValueError(f"a delta's name is a text without {_TASK!r}, which stands before a task, got {name!r}")
        if name in self._sources:
            raise ValueError(f"the pool has a delta named {name!r}: remove that first, or choose another name")
        info = delta.info if isinstance(delta, SparseDelta) else _read_info(delta, revision)
        self._sources[name] = _Source(delta, info, revision, force)

    def remove(self, name: str) -> None:
        """Forget a delta.

        Raises:
            ValueError: there is none of that name, it is one task of a merged delta, or it is in use.
        """
        key, task = self._split(name)
        if task:
            raise ValueError(f"{name!r} is one task of a merged delta: remove {key!r}, which has all of them")
        self.evict(key)
        del self._sources[key]

    def preload(self, names: Iterable[str] | None = None) -> None:
        """Read deltas into memory now, so that their first use need not.

        Args:
            names: of :attr:`names`; all of them by default.

        Raises:
            ValueError: an unknown name, a delta of another base, or deltas that do not fit into the memory together.
        """
        wanted = list(dict.fromkeys(self._split(name)[0] for name in (self.names if names is None else names)))
        for name in wanted:
            deltas = self._read([name])
            with self._turn():
                self._bring([name], deltas)
        if lacking := [name for name in wanted if name not in self._loaded]:
            raise PoolMemoryError(
                f"{few_names(lacking)} had to leave again for others, since all together have more than the "
                f"{self.memory:,} bytes that the pool may have: give it more (memory=...)"
            )

    def evict(self, name: str) -> None:
        """Drop a delta's values from memory; it stays known.

        Raises:
            ValueError: there is none of that name.
            RuntimeError: this thread uses the pool at this moment.
        """
        name, _ = self._split(name)
        with self._turn():
            self._loaded.pop(name, None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """``with pool.use("sst2") as model: model(**batch)``: the model with a delta's weights while the block runs.

        Args:
            name: one of :attr:`names`; None for the base.

        Raises:
            ValueError: an unknown name, a delta of another base, or one larger than the memory.
            RuntimeError: the thread is inside a block of this pool already.
        """
        if name is None:
            with self._turn():
                yield self.model
            return
        key, task = self._split(name)
        deltas = self._read([key])
        with self._turn():
            (bound,) = self._bring([key], deltas)
            with restored_after(self._restore):
                begin = perf_counter()
                bound.write(task, self._undo)
                self._swap_seconds += perf_counter() - begin
                self._guard.open()
                yield self.model

    @contextmanager
    def mixed(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """``with pool.mixed(["sst2", "math", "sst2"]) as model: model(**batch)``: one delta a row of the batch.

        The dense products are computed once for all rows, each row's changes beside them. The batch is the first
        dimension of what the model is called with. Linear maps, embeddings, convolutions, norms and biases can be
        mixed; what cannot is refused by name, and nothing is computed with the wrong weights.

        Args:
            names: of each row, one of :attr:`names`, or None for the base.

        Raises:
            ValueError: as :meth:`use`, for all deltas of the batch together.
            CannotMixError: a delta, or inside the block a model or a batch, of which the rows cannot have their own.
            RuntimeError: the thread is inside a block of this pool already.
        """
        keys = [None if name is None else self._split(name) for name in names]
        rows = BatchRows(keys)
        wanted = list(dict.fromkeys(key for key, _ in rows.keys))
        deltas = self._read(wanted)
        with self._turn():
            bound = dict(zip(wanted, self._bring(wanted, deltas), strict=True))
            changes = [bound[key].changes(task) for key, task in rows.keys]
            self._make_room(wanted)
            tensors = {identity: at[:2] for of_delta in changes for identity, at in of_delta.items()}
            together = [
                (name, tensor, [c[identity][2] if identity in c else None for c in changes])
                for identity, (name, tensor) in tensors.items()
            ]
            with MixedBatch(self.model, rows, together, self._batch_first):
                yield self.model

    def map(
        self,
        requests: Iterable[Request],
        *,
        key: Callable[[Request], str | None],
        forward: Callable[[nn.Module, list[Request]], Sequence[Result]],
        batch_size: int = 32,
        mix_up_to: int | None = None,
    ) -> list[Result]:
        """Answer requests for many deltas, in as few and as fast forwards as can be.

        Requests of one delta are answered together. Deltas with few requests share batches, as in :meth:`mixed`, where
        that is faster and can be done; the others are used one after the other.

        Args:
            requests: of any type.
            key: of a request the delta: one of :attr:`names`, or None for the base.
            forward: called with the model and up to ``batch_size`` requests, gives one result for each of them in their
                order, such as ``lambda model, texts: model(**tokenizer(texts, ...)).logits``. The first call with
                requests for several deltas also times it, so it should do nothing else.
            batch_size: most requests of a forward.
            mix_up_to: requests of one delta up to which it shares batches; 0 for never; timed once by default.

        Returns:
            A result for each request, in their order.

        Raises:
            ValueError: as :meth:`use`, before anything is computed where a name is unknown, or a forward that gives
                another number of results.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is the most requests of a forward, at least 1, got {batch_size}")
        requests = list(requests)
        names = [key(request) for request in requests]
        for name in dict.fromkeys(names):
            if name is not None:
                self._split(name)
        return self._requests.run(requests, names, forward, batch_size, mix_up_to)

    def shapes(self, name: str | None) -> frozenset[tuple[str, tuple[int, ...]]]:
        """The tensors of which a delta has another shape than the base, such as a head of other labels, by name. Deltas
        that have the same can share a batch.

        Args:
            name: one of :attr:`names`, or None for the base.

        Raises:
            ValueError: as :meth:`use`.
        """
        if name is None:
            return frozenset()
        key, task = self._split(name)
        with self._turn():
            (bound,) = self._bring([key], {})
            return bound.shapes(task)

    def alone(self) -> AbstractContextManager[None]:
        """Other threads wait until the block ends; this one goes on using the pool."""
        return locked([*self._modules, self])

    def pipeline(self, task: str, tokenizer: Any = None, **pipeline_settings: Any) -> DeltaPipeline:
        """``pipe = pool.pipeline("text-classification"); pipe("text", delta="sst2")``: a pipeline of transformers over
        the pool's model.

        Args and errors: as :class:`dpp_lightning.serving.delta_pipeline.DeltaPipeline`.
        """
        from dpp_lightning.serving.delta_pipeline import DeltaPipeline  # transformers takes long to import

        return DeltaPipeline(self, task, tokenizer, **pipeline_settings)

    def side_files(self, name: str) -> dict[str, Path | None]:
        """What a delta's folder says of the files beside its weights, as
        :func:`dpp_lightning.storage.model_folder.delta_side_files`; nothing for a delta in memory.

        Args:
            name: one of :attr:`names`.

        Raises:
            ValueError: an unknown name, or a link that leads out of the folder.
        """
        key, task = self._split(name)
        source = self._sources[key]
        if isinstance(source.delta, SparseDelta):
            return {}
        info = source.info
        return delta_side_files(source.delta, source.revision, tasks=info.tasks, task=task, absent=info.absent_files)

    def stats(self) -> PoolStats:
        """What the pool has done so far, and what is in memory."""
        return PoolStats(
            self._hits,
            self._loads,
            self._evictions,
            self._swaps,
            1e3 * self._swap_seconds / max(self._swaps, 1),
            1e3 * self._load_seconds / max(self._loads, 1),
            sum(bound.num_bytes for bound in list(self._loaded.values())),
            self.memory,
            tuple(self._loaded),
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock of the model and the pool; what an interrupt left in the model is taken off first."""
        with self.alone():
            if self._in_use:
                raise RuntimeError("this thread is inside a block of this pool: end that before the next begins")
            self._restore()
            self._guard.check()
            with restored_after(self._leave):
                self._in_use = True
                self._guard.open()
                yield

    def _leave(self) -> None:
        self._guard.look()
        self._in_use = False

    def _read(self, names: list[str]) -> dict[str, SparseDelta]:
        """Those of some sources that are not in memory; outside of the lock, so that others go on meanwhile."""
        return {name: self._sources[name].read() for name in names if name not in self._loaded}

    def _bring(self, names: list[str], deltas: dict[str, SparseDelta]) -> list[BoundDelta]:
        """Deltas into memory, others out of it.

        Args:
            names: of sources, all to be there at once.
            deltas: those that were read already.
        """
        for name in names:
            bound = self._loaded.pop(name, None)
            self._hits += bound is not None
            self._loaded[name] = bound or self._bind(name, deltas.get(name))
        self._make_room(names)
        return [self._loaded[name] for name in names]

    def _make_room(self, needed: list[str]) -> None:
        """Drop the values of other deltas until the rest has no more bytes than the memory.

        Raises:
            ValueError: those that are needed have more; they are dropped too.
        """
        total = sum(bound.num_bytes for bound in self._loaded.values())
        for name in [name for name in self._loaded if name not in needed]:
            if total > self.memory:
                total -= self._loaded.pop(name).num_bytes
                self._evictions += 1
        if total > self.memory:
            for name in needed:
                del self._loaded[name]
            raise PoolMemoryError(
                f"{few_names(needed)} {'take' if len(needed) > 1 else 'takes'} {total:,} bytes in memory, and the pool "
                f"may have {self.memory:,}: give it more (memory=...)"
            )

    def _bind(self, name: str, delta: SparseDelta | None) -> BoundDelta:
        begin = perf_counter()
        source = self._sources[name]
        try:
            bound = BoundDelta(delta or source.read(), self.model, force=source.force)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        self._loads += 1
        self._load_seconds += perf_counter() - begin
        return bound

    def _split(self, name: str) -> tuple[str, str | None]:
        """The name of a source and the task, of what :meth:`use` takes.

        Raises:
            ValueError: there is no such delta, or no such task in it.
        """
        key, at, task = name.partition(_TASK)
        if key not in self._sources:
            raise ValueError(f"the pool has no delta {key!r}; it has {few_names(self.names) or 'none'}")
        tasks = self._sources[key].info.tasks
        if at and task not in tasks:
            known = f"it merges {few_names(tasks)}" if tasks else "it is no merged delta"
            raise ValueError(f"the delta {key!r} has no task {task!r}: {known}")
        return key, task if at else None

    def _restore(self) -> None:
        """Take off what is written; a second call does what the first did not."""
        if self._undo:
            self._guard.close()
            begin = perf_counter()
            for put_back in self._undo:
                put_back()
            self._undo.clear()
            self._swaps += 1
            self._swap_seconds += perf_counter() - begin


def _full_names(name: str, info: DeltaInfo) -> list[str]:
    return [f"{name}{_TASK}{task}" for task in info.tasks] or [name]


def _read_info(source: str | Path, revision: str | None) -> DeltaInfo:
    check_delta(source, "delta", revision)
    return read_config((local_folder(source, revision, [CONFIG_FILE]) / CONFIG_FILE).read_bytes())[0]
