"""Overwriting entries of vLLM's weights in place, by way of the model's own loader.

The loader knows where the tensors of a checkpoint go: into which rows of packed query, key and value, which columns on
which worker. It is run on the base's tensors, and each copy that it would make is replaced: where the source is a view
of a tensor of the checkpoint, it tells which entries would go where, and only those that change are written. A tensor
of which the loader copies something else, such as its heads in another order, is given to it whole with the new values
in it. vLLM's own ``load_checkpoint_weight_patches`` goes over all entries of every tensor of which some change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.serving.base_checkpoint import NewValues
from dpp_lightning.storage.locate import few_names

_BYTES = 1 << 30  # of new values at once


def check_loader(model: nn.Module, tensors: Mapping[str, Tensor], *, all_layers: bool = True) -> set[str]:
    """Ask the model's loader where it would copy tensors of the checkpoint, without letting it.

    A tensor that the loader leaves out, as it would of a dense model, is warned of.

    Args:
        model: the worker's model, with the values of ``tensors`` in it.
        tensors: name in the checkpoint to tensor of the base.
        all_layers: this worker has all of the model's layers, so that each tensor should find a place.

    Returns:
        Names of those among them that the loader has to be given whole.

    Raises:
        ValueError: a tensor that the model lacks, or has no place of its form for.
    """
    left_out, whole = [], set()
    for name, tensor in tensors.items():
        plain: list[bool] = []

        def note(destination: Tensor, source: Tensor, tensor: Tensor = tensor, plain: list[bool] = plain) -> None:
            _check_place(destination, source)
            plain.append(_is_part(tensor, source))

        try:
            with _copies_replaced(note):
                _load(model, {name: tensor})
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{type(model).__name__} of vLLM cannot be given {name} in place ({reason})") from error
        if not plain:
            left_out.append(name)
        elif not all(plain):
            whole.add(name)
    if left_out and all_layers:
        warnings.warn(f"vLLM loads no {few_names(left_out)}, so the delta's values are left out", stacklevel=2)
    return whole


def overwrite(
    model: nn.Module, tensors: Mapping[str, Tensor], new: Iterable[tuple[str, NewValues]], whole: Set[str] = frozenset()
) -> None:
    """Write new values into the model, rounded to its dtype.

    Args:
        model: the worker's model; its loader was checked for all tensors.
        tensors: name in the checkpoint to tensor of the base, of those that change and others.
        new: name in the checkpoint and new values of each tensor; taken as they are written, about a gigabyte at once.
            At other entries the model has the base's values.
        whole: names of those that the loader has to be given whole.

    Raises:
        ValueError: the loader copies something else than it did when it was checked; part of it may be written.
    """
    batch: dict[str, NewValues] = {}
    for name, values in new:
        if name in whole:
            _load(model, {name: _filled(tensors[name], values)})
            continue
        batch[name] = values
        if sum(part.values.nbytes for part in batch.values()) >= _BYTES:
            _overwrite(model, {name: tensors[name] for name in batch}, batch)
            batch = {}
    _overwrite(model, {name: tensors[name] for name in batch}, batch)


def _filled(tensor: Tensor, new: NewValues) -> Tensor:
    """The base's tensor with new values in it."""
    if new.indices is None:
        return new.values.view(tensor.shape)
    return tensor.reshape(-1).index_copy(0, new.indices, new.values).view(tensor.shape)


def _overwrite(model: nn.Module, tensors: Mapping[str, Tensor], new: Mapping[str, NewValues]) -> None:
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)

    def write(destination: Tensor, source: Tensor) -> None:
        near = by_storage.get(source.untyped_storage().data_ptr(), [])
        name = next((name for name in near if _is_part(tensors[name], source)), None)
        if name is None:
            raise ValueError("vLLM's loader copies something else than it did before")
        _check_place(destination, source)
        offset = int(source.storage_offset() - tensors[name].storage_offset())
        _write(destination, source.stride(), offset, new[name], copy)

    with _copies_replaced(write) as copy:
        _load(model, tensors)


@torch.no_grad()
def _load(model: Any, tensors: Mapping[str, Tensor]) -> None:
    model.load_weights(list(tensors.items()))


@contextmanager
def _copies_replaced(work: Callable[[Tensor, Tensor], None]) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """While it lasts, work is done in place of every ``destination.copy_(source)``; gives the true one."""
    copy = Tensor.copy_

    def replaced(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        work(destination, source)
        return destination

    Tensor.copy_ = replaced  # type: ignore[assignment, method-assign]
    try:
        yield copy
    finally:
        Tensor.copy_ = copy  # type: ignore[method-assign]


def _check_place(destination: Tensor, source: Tensor) -> None:
    if destination.shape != source.shape:
        raise ValueError(f"its place has shape {tuple(destination.shape)}, not {tuple(source.shape)}")


def _is_part(tensor: Tensor, source: Tensor) -> bool:
    """Whether a source is a view of (a part of) a contiguous tensor, with every entry once."""
    same = source.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and source.dtype == tensor.dtype
    offset = int(source.storage_offset() - tensor.storage_offset())
    spans = sorted((stride, size) for stride, size in zip(source.stride(), source.shape, strict=True) if size > 1)
    once = all(stride >= inner * size for (stride, _), (inner, size) in zip(spans[1:], spans, strict=False))
    once = once and (not spans or spans[0][0] > 0)
    return same and once and tensor.is_contiguous() and 0 <= offset < max(tensor.numel(), 1)


def _write(
    destination: Tensor,
    strides: tuple[int, ...],
    offset: int,
    new: NewValues,
    copy: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Write the new values of the part of a tensor that begins at an offset and has these strides."""
    if new.indices is None:
        copy(destination, new.values.as_strided(destination.shape, strides, new.values.storage_offset() + offset))
        return
    indices = new.indices.to(destination.device) - offset
    values = new.values.to(destination.device, destination.dtype)
    if destination.is_contiguous() and strides == destination.stride():  # the part is a run of entries
        inside = (indices >= 0) & (indices < destination.numel())
        if not bool(inside.all()):
            indices, values = indices[inside], values[inside]
        destination.view(-1).index_copy_(0, indices, values)
        return
    place, inside = _places(indices, destination.shape, strides)
    destination[tuple(axis[inside] for axis in place)] = values[inside]


def _places(indices: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Where entries lie in a part of a tensor, one index for each of its axes, and whether they are in it.

    A position is divided by the strides, the largest first: where the part has the entry, the quotients are its place.

    Args:
        indices: positions relative to the part's first entry, shape (entries,).
        shape, strides: of the part, every entry once.
    """
    rest, inside = indices, indices >= 0
    place = [torch.zeros_like(indices)] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda axis: -strides[axis]):
        if shape[axis] > 1:
            place[axis] = rest.div(strides[axis], rounding_mode="floor")
            inside &= place[axis] < shape[axis]
            rest = rest - place[axis] * strides[axis]
    return place, inside & (rest == 0)
