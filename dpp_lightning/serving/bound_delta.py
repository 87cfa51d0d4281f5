"""A delta bound to a model's tensors: everything that a swap needs is computed once, so that a swap only overwrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from operator import setitem
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.match_tensors import check_base, find_tensors, named_for
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.delta.target import DeltaTarget
from dpp_lightning.serving.flat_positions import FlatPositions
from dpp_lightning.serving.sparse_products import CannotMixError, WeightChange
from dpp_lightning.storage.locate import few_names
from dpp_lightning.tensors.flat_entries import add_rescaled, check_finite, gather_entries
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import NamedTensor, describe_source

Undo = list[Callable[[], object]]  # each puts a part of the base back, and may be called again

_NOTHING = torch.empty(0, dtype=torch.int32), torch.empty(0)  # no positions, no differences
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry to a dtype of numpy's


@dataclass(frozen=True)
class ChangedEntries:
    """Some entries of one of the model's tensors, and what a delta makes of them.

    Attributes:
        name: the delta's name of the tensor.
        owner: the model's tensor.
        view: the owner without gradients, or the part of it that the delta's tensor is.
        positions: sorted distinct flat positions in the view, C order, int32 or int64, shape (changed,).
        values: theta_0 + delta / q there, of the view's dtype, shape (changed,).
    """

    name: str
    owner: Tensor
    view: Tensor
    positions: Tensor
    values: Tensor


@dataclass(frozen=True)
class ChangedTensor:
    """One of the model's tensors that a delta changes as a whole: a carried one, one with factors, one that grew.

    Attributes:
        name: the delta's name of the tensor.
        named: where it lies in the model.
        carried: the tensor itself, in the model's dtype; None where it is computed.
        sparse: kept entries and factors; None for a carried tensor.
        rows: rows that follow those in common with the base.
        q: what kept values are divided by.
    """

    name: str
    named: NamedTensor
    carried: Tensor | None = None
    sparse: SparseTensor | None = None
    rows: Tensor | None = None
    q: float = 1.0

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that it holds."""
        factors = self.sparse.factors if self.sparse else None
        held = [self.carried, self.rows, *((self.sparse.values, self.sparse.indices) if self.sparse else ())]
        return [t for t in (*held, *((factors.left, factors.right) if factors else ())) if t is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the fine-tuned model's tensor has."""
        if self.sparse is None:
            assert self.carried is not None
            return tuple(self.carried.shape)
        rows = 0 if self.rows is None else len(self.rows)
        return (self.sparse.shape[0] + rows, *self.sparse.shape[1:]) if rows else self.sparse.shape

    def values(self, base: Tensor) -> Tensor:
        """The whole tensor as the fine-tuned model has it.

        Args:
            base: the model's tensor, with or without the further rows.
        """
        if self.sparse is None:
            assert self.carried is not None
            return self.carried
        common = base.detach().reshape(-1)[: prod(self.sparse.shape)]
        if self.sparse.factors:
            whole = add_rescaled(common, *self.sparse.change(self.q))
        else:
            kept = self.sparse.indices.to(common.device, torch.int64)
            whole = common.clone().index_copy_(0, kept, add_rescaled(common[kept], self.sparse.values, self.q))
        whole = whole.view(self.sparse.shape)
        return whole if self.rows is None else torch.cat([whole, self.rows.to(whole)])

    def write(self, undo: Undo) -> None:
        """Put it into the model: all of a tensor by changing what it refers to, else by overwriting.

        Args:
            undo: gets what puts the base back, before anything is changed.
        """
        owner = self.named.owner
        if self.named.whole:
            base = owner.data
            values = self.values(base)
            undo.append(partial(setattr, owner, "data", base))
            owner.data = values
            return
        parts = pieces(self.named)
        values = self.values(self.named.tensor)
        undo.extend(partial(view.copy_, view.clone()) for view in parts)
        for view, part in zip(parts, values.split([len(view) for view in parts]), strict=True):
            view.copy_(part)


class BoundDelta:
    """A delta, checked against a model that holds its base, and ready to be written into it.

    Args:
        delta: in memory; of a merged delta all tasks.
        model: holds the base.
        force: do so although the model's values are not those of the delta's base.

    Raises:
        ValueError: tensors missing or of another shape, another base, sums that overflow the model's dtype, or tensors
            that cannot be overwritten.
    """

    @torch.inference_mode(False)  # what is made in a block of it serves others too
    def __init__(self, delta: SparseDelta, model: nn.Module, *, force: bool = False) -> None:
        tasks: list[str | None] = [*delta.info.tasks] if delta.contents.needs_task else [None]
        carried = {task: dict(delta.contents.for_task(task).carried) for task in tasks}
        names = {*delta.tensors, *(name for tensors in carried.values() for name in tensors)}
        offered = named_for(model, names)
        found = {task: _find(delta, tensors, offered, model) for task, tensors in carried.items()}
        for places in found.values():
            _check_writable(delta, places)
        entries, self._computed = _pruned(delta, found[tasks[0]], model, force=force)
        self._carried = {task: _carried(tensors, found[task]) for task, tensors in carried.items()}
        self._on_host = _HostEntries([e for e in entries if _is_flat_on_host(e.view)])
        self._others = [e for e in entries if not _is_flat_on_host(e.view)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all that it holds, without what belongs to the model; more once it was in a mixed batch."""
        return self._bytes + (self._bytes_when_mixed if "_sparse_changes" in self.__dict__ else 0)

    @cached_property
    def _bytes(self) -> int:
        wholes = [*self._computed, *(tensor for tensors in self._carried.values() for tensor in tensors)]
        parts = [part for whole in wholes for part in whole.parts]
        parts += [part for entries in self._others for part in (entries.positions, entries.values)]
        return self._on_host.num_bytes + bytes_of(parts)

    @cached_property
    def _bytes_when_mixed(self) -> int:
        return sum(change.num_bytes for _, _, change in self._sparse_changes.values())

    @torch.inference_mode(False)
    def changes(self, task: str | None) -> dict[int, tuple[str, Tensor, WeightChange]]:
        """What a mixed batch needs of it, while the model holds the base: identity of a tensor of the model to its
        name, itself, and what changes.

        Args:
            task: as for :meth:`write`.

        Raises:
            CannotMixError: a vocabulary that grew, or a tensor that is a part of one of the model's.
        """
        wholes = {id(whole.named.owner): _whole_change(whole) for whole in self._wholes(task)}
        return {**self._sparse_changes, **wholes}

    @cached_property
    def _sparse_changes(self) -> dict[int, tuple[str, Tensor, WeightChange]]:
        return {id(e.owner): _sparse_change(e) for e in (*self._on_host.unpacked(), *self._others)}

    def _wholes(self, task: str | None) -> list[ChangedTensor]:
        """The tensors that it changes as a whole."""
        key = task if task in self._carried else None
        if key not in self._carried:
            tasks = [known for known in self._carried if known]
            raise ValueError(
                f"this delta merges {few_names(tasks)}, with a head for each: choose one (NAME@{tasks[0]})"
            )
        return [*self._computed, *self._carried[key]]

    def shapes(self, task: str | None) -> frozenset[tuple[str, tuple[int, ...]]]:
        """The tensors to which it gives another shape, by name.

        Args:
            task: as for :meth:`write`.
        """
        resized = (whole for whole in self._wholes(task) if whole.shape != tuple(whole.named.owner.shape))
        return frozenset((whole.name, whole.shape) for whole in resized)

    def write(self, task: str | None, undo: Undo) -> None:
        """Write the fine-tuned values into the model, which holds the base. O(kept), and O(entries) of tensors with
        factors or a vocabulary that grew.

        Args:
            task: of a merged delta with a head for each task; of no importance where the tasks have all in common.
            undo: gets what puts the base back, each part before it is changed.

        Raises:
            ValueError: a task is needed, and none is given.
        """
        wholes = self._wholes(task)
        self._on_host.write(undo)
        for entries in self._others:
            target, index = _target(entries.view, entries.positions.long())
            undo.append(partial(setitem, target, index, target[index]))
            target[index] = entries.values
        for whole in wholes:
            whole.write(undo)


class _HostEntries:
    """Changed entries of contiguous tensors in the CPU's memory, written by numpy, which is fastest there.

    Args:
        entries: their positions are held in two bytes each.
    """

    def __init__(self, entries: list[ChangedEntries]) -> None:
        none = torch.empty(0, dtype=torch.int64)
        self._entries = [replace(e, positions=none) for e in entries]
        self._positions = FlatPositions([e.positions for e in entries])
        self._targets = [_bits(e.view) for e in entries]
        self._values = [_bits(e.values) for e in entries]

    @property
    def num_bytes(self) -> int:
        """Bytes of positions and values."""
        return self._positions.num_bytes + bytes_of(e.values for e in self._entries)

    def unpacked(self) -> Iterator[ChangedEntries]:
        """The entries with their positions."""
        for entries, positions in zip(self._entries, self._positions.unpack(), strict=True):
            yield replace(entries, positions=torch.from_numpy(positions))

    def write(self, undo: Undo) -> None:
        """As :meth:`BoundDelta.write`."""
        for target, positions, values in zip(self._targets, self._positions.unpack(), self._values, strict=True):
            undo.append(partial(setitem, target, positions, target[positions]))
            target[positions] = values


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that tensors hold, each stretch of it once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def pieces(named: NamedTensor) -> list[Tensor]:
    """The model's tensors, or views of parts of them, that a tensor of the files consists of, without gradients."""
    return [place.of(owner).detach() for owner, place in named.pieces]


def _find(
    delta: SparseDelta, carried: Mapping[str, Tensor], offered: list[NamedTensor], model: nn.Module
) -> dict[str, NamedTensor]:
    """Where a delta's tensors lie in a model, by the delta's names, shapes checked.

    A tensor of the model may have another number of rows where the delta carries it, as a head of other labels, and
    the base's where its vocabulary grew.
    """
    tensors = {n.name: n.tensor for n in offered}
    by_name = {n.name: n for n in offered}
    names = match_names([*delta.tensors, *carried], tensors)
    shapes: dict[str, tuple[int, ...] | None] = {}
    for name in (*delta.tensors, *carried):
        allowed = [tuple(carried[name].shape)] if name in carried else _shapes(delta, name)
        place = by_name[names[name]] if name in names else None
        actual = tuple(tensors[names[name]].shape) if place else None
        resized = place is not None and place.whole and actual is not None and (name in carried or actual in allowed)
        shapes[name] = None if resized and actual and actual[1:] == allowed[0][1:] else allowed[-1]
    find_tensors(shapes, tensors, describe_source(model), delta.info)
    return {name: by_name[names[name]] for name in shapes}


def _shapes(delta: SparseDelta, name: str) -> list[tuple[int, ...]]:
    """The shapes that a pruned tensor has in the base and in the fine-tuned model."""
    base, rows = delta.tensors[name].shape, delta.new_rows.get(name)
    return [base] if rows is None else [base, (base[0] + len(rows), *base[1:])]


def _check_writable(delta: SparseDelta, places: Mapping[str, NamedTensor]) -> None:
    found = {name: place.tensor for name, place in places.items()}
    DeltaTarget(found, places, delta.tensors, delta.new_rows).check_writable()


def _pruned(
    delta: SparseDelta, places: Mapping[str, NamedTensor], model: nn.Module, *, force: bool
) -> tuple[list[ChangedEntries], list[ChangedTensor]]:
    """What a delta changes of the pruned tensors, the base checked."""
    bases = {name: places[name].tensor.detach() for name in delta.tensors}
    if not force:
        held = (gather_entries(bases[name], tensor.changed) for name, tensor in delta.tensors.items())
        check_base(held, delta.contents, model, describe_source(model))
    entries: list[ChangedEntries] = []
    wholes: list[ChangedTensor] = []
    for name, tensor in delta.tensors.items():
        place, rows, base = places[name], delta.new_rows.get(name), bases[name]
        grows = rows is not None and tuple(base.shape) == tensor.shape
        if tensor.factors or grows:
            wholes.append(ChangedTensor(name, place, sparse=tensor, rows=rows, q=delta.q))
            check_finite({name: wholes[-1].values(base)}, delta.q)
            continue
        positions = tensor.indices.long()
        values = add_rescaled(gather_entries(base, positions), tensor.values, delta.q)
        if rows is not None:
            positions = torch.cat([positions, torch.arange(prod(tensor.shape), base.numel())])
            values = torch.cat([values, rows.to(values).reshape(-1)])
        check_finite({name: values}, delta.q)
        entries += _in_pieces(name, place, positions, values)
    return entries, wholes


def _in_pieces(name: str, place: NamedTensor, positions: Tensor, values: Tensor) -> Iterator[ChangedEntries]:
    """Changed entries of a tensor of the files as entries of the model's tensors that it consists of."""
    start = 0
    for view, (owner, _) in zip(pieces(place), place.pieces, strict=True):
        bounds = torch.tensor([start, start + view.numel()])
        first, last = torch.searchsorted(positions, bounds).tolist()
        if last > first:
            here = positions[first:last] - start
            yield ChangedEntries(name, owner, view, here.to(view.device, torch.int64), values[first:last])
        start += view.numel()


def _carried(tensors: Mapping[str, Tensor], places: Mapping[str, NamedTensor]) -> list[ChangedTensor]:
    changed = []
    for name, tensor in tensors.items():
        owner = places[name].owner
        held = tensor.detach().to(owner.device, owner.dtype, copy=True, memory_format=torch.contiguous_format)
        changed.append(ChangedTensor(name, places[name], carried=held))
    return changed


def _sparse_change(entries: ChangedEntries) -> tuple[str, Tensor, WeightChange]:
    owner, positions = entries.owner, entries.positions.cpu()
    if entries.view.shape != owner.shape:
        raise CannotMixError(_of_a_part(entries.name))
    if _goes_with_rows(owner):
        vector = owner.detach().clone()
        vector.view(-1)[entries.positions] = entries.values
        return entries.name, owner, _of_vector(owner, vector, positions)
    differences = entries.values.float() - gather_entries(entries.view, positions).float()
    narrow = positions.int() if owner.numel() < 1 << 31 else positions
    return entries.name, owner, WeightChange(owner.shape, narrow, differences.cpu())


def _whole_change(whole: ChangedTensor) -> tuple[str, Tensor, WeightChange]:
    owner = whole.named.owner
    if not whole.named.whole:
        raise CannotMixError(_of_a_part(whole.name))
    if whole.rows is not None:
        raise CannotMixError(f"{whole.name} has more rows than the base's, which a batch cannot have")
    sparse, factors = whole.sparse, whole.sparse.factors if whole.sparse else None
    if _goes_with_rows(owner):
        return whole.name, owner, _of_vector(owner, whole.values(owner))
    if sparse is None or factors is None or owner.dim() != 2:
        return whole.name, owner, WeightChange(owner.shape, *_NOTHING, whole=whole.values(owner))
    differences = sparse.values.float() / whole.q
    return whole.name, owner, WeightChange(owner.shape, sparse.indices, differences, factors)


def _of_a_part(name: str) -> str:
    return f"{name} is a part of one of the model's tensors, and rows cannot have their own"


def _goes_with_rows(tensor: Tensor) -> bool:
    """Whether a batch can have one of it for each row: a vector, or a tensor that has one row itself."""
    return tensor.dim() == 1 or (tensor.dim() > 1 and len(tensor) == 1)


def _of_vector(base: Tensor, vector: Tensor, positions: Tensor | None = None) -> WeightChange:
    """The change of a tensor that rows have one each of; its positions are all where none are given, and none where it
    has another shape."""
    if vector.shape != base.shape:
        return WeightChange(base.shape, *_NOTHING, whole=vector)
    positions = torch.arange(base.numel()) if positions is None else positions
    differences = (vector.float() - base.detach().float()).cpu().reshape(-1)[positions.long()]
    return WeightChange(base.shape, positions, differences, whole=vector)


def _is_flat_on_host(view: Tensor) -> bool:
    return view.device.type == "cpu" and view.is_contiguous()


def _bits(tensor: Tensor) -> NDArray[Any]:
    """A contiguous tensor's memory as a line of integers of the same size, which numpy has for every dtype."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()]).numpy()


def _target(view: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
    """A tensor and an index into it that stand for flat positions of a view."""
    if view.is_contiguous():
        return view.view(-1), positions
    return view, torch.unravel_index(positions, view.shape)
