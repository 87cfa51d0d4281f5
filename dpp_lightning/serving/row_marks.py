"""Marks of tensors whose first dimension is not the rows of a batch, however long it is.

A mixed batch tells the rows by the length of a tensor's first dimension. Two kinds of tensors may have that length by
chance: what was picked out of the rows or put into another order, such as masked tokens, those of an expert or
negatives of the batch, and what the model makes of its own tensors alone, such as learned queries or a table of
positions. Both are marked as they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_PICKED, _OWN = "picked or put into another order", "made of the model's own tensors alone"
_MARK, _PIECE = "_dpp_no_rows", "_dpp_piece_of_rows"
# Functions by their names, which torch's own and a tensor's have in common.
_PICKING = ("masked_select", "nonzero")
# Those that move what lies along a dimension, and where that comes among the arguments.
_MOVING = {
    "flip": 1, "roll": 2, "rot90": 2, "sort": 1, "topk": 2, "gather": 1, "scatter": 1, "scatter_": 1, "index_copy": 1,
    "index_copy_": 1, "index_add": 1, "index_add_": 1, "take_along_dim": 2,
}  # fmt: skip
_WITHOUT_DIM = ("flip", "roll", "rot90", "take_along_dim")  # others take the last
_PIECES = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2, "narrow": 1, "select": 1}
_RESHAPING = ("reshape", "view", "flatten", "unflatten")
_SPLITTING, _JOINING = ("unbind", "split", "chunk", "tensor_split"), ("cat", "concat", "stack")
_WRITING = ("__setitem__", "scatter_", "index_copy_", "index_add_")


class RowMarks:
    """The marks of one batch.

    Args:
        own: tensors of the model: parameters and buffers.
        rows: of the batch.
    """

    def __init__(self, own: Iterable[Tensor], rows: int) -> None:
        self._own, self._rows = {id(tensor) for tensor in own}, rows

    def of(self, tensor: Tensor) -> str | None:
        """Why a tensor's first dimension is not the rows; None where it may be, also as all its rows are equal."""
        mark = self._mark_of(tensor)
        if mark == _OWN and len(tensor) and bool((tensor == tensor[:1]).all()):
            return None
        return mark

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Mark what a function gave, by what it was given."""
        given, name = list(_tensors((*args, *kwargs.values()))), getattr(func, "__name__", "")
        if not given:
            return
        joins = name in _JOINING and kwargs.get("dim", args[1] if len(args) > 1 else 0) == 0
        if joins and _are_all_in_order(given):
            return
        marks = [self._mark_of(tensor) for tensor in given]
        picked = _PICKED in marks or self._picks(name, args, kwargs) or self._regroups(name, given[0], result)
        mark = _PICKED if picked else None
        if mark is None and all(found == _OWN for found in marks):
            mark = _OWN
        if mark is not None:
            written = args[:1] if name in _WRITING and mark == _PICKED else ()
            for tensor in _tensors(written):
                setattr(tensor, _MARK, mark)
            for tensor in _tensors((result,)):
                if not any(tensor is one for one in given):  # what was written in place stays what it was
                    setattr(tensor, _MARK, mark)
        if name in _SPLITTING and mark == _PICKED and _PICKED not in marks:
            for index, piece in enumerate(result):
                setattr(piece, _PIECE, (given[0], index, len(result)))

    def _mark_of(self, tensor: Tensor) -> str | None:
        return _OWN if id(tensor) in self._own else getattr(tensor, _MARK, None)

    def _picks(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function takes some of the rows, or all of them in another order; a table of the model has none."""
        if args and isinstance(args[0], Tensor) and self._mark_of(args[0]) == _OWN:
            return False
        if name in _PICKING:
            return True
        if name == "index_select":
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            index = args[2] if len(args) > 2 else kwargs.get("index")
            return axis == 0 and self._reorders(index)
        if name in ("__getitem__", "__setitem__"):
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            written = name == "__setitem__"
            if isinstance(first, Tensor | list):
                return not (written and torch.as_tensor(first).dtype == torch.bool) and self._reorders(first)
            return not written and self._takes_some(args[0], first)
        return self._moves(name, args, kwargs)

    def _regroups(self, name: str, given: Tensor, result: Any) -> bool:
        """Whether a reshape gives as many rows out of a first dimension that is no multiple of them."""
        shape = given.shape
        if name not in _RESHAPING or not isinstance(result, Tensor) or not shape:
            return False
        return result.shape[:1] == (self._rows,) and shape[0] != 1 and shape[0] % self._rows != 0

    def _takes_some(self, tensor: Tensor, first: Any) -> bool:
        """Whether a number or slice takes some of the rows, or all in another order."""
        if tensor.shape[:1] != (self._rows,) or not isinstance(first, int | slice):
            return False
        return isinstance(first, int) or first.indices(self._rows) != (0, self._rows, 1)

    def _moves(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function of that name puts rows into another order, or takes them apart."""
        if (name not in _MOVING and name not in _PIECES) or not args or not isinstance(args[0], Tensor):
            return False
        place = _MOVING.get(name, _PIECES.get(name, 0))
        given = args[place:] if name == "flip" else args[place : place + 1]
        dims = kwargs.get("dims", kwargs.get("dim", given or None))
        if dims is None or dims == ():
            return name in _WITHOUT_DIM or (name in _PIECES and args[0].shape[:1] == (self._rows,)) or args[0].dim() < 2
        flat = [dim for part in (dims if isinstance(dims, list | tuple) else [dims]) for dim in _numbers(part)]
        along = any(dim in (0, -args[0].dim()) for dim in flat)
        return along and (name in _MOVING or args[0].shape[:1] == (self._rows,))

    def _reorders(self, index: Any) -> bool:
        """Whether an index of the first dimension is another than all rows in their order."""
        index = torch.as_tensor(index)
        if index.dtype == torch.bool or index.is_floating_point() or index.shape[:1] != (self._rows,):
            return index.dim() > 0 or index.dtype == torch.bool
        counted = torch.arange(self._rows, device=index.device).view(-1, *(1,) * (index.dim() - 1))
        return not bool((index == counted).all())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in the lists and tuples there."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _are_all_in_order(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are the pieces of one that was split, all of them and in their order."""
    whole: Any = None
    for place, tensor in enumerate(tensors):
        of, index, count = getattr(tensor, _PIECE, (None, 0, 0))
        whole = of if whole is None else whole
        if of is None or of is not whole or index != place or count != len(tensors):
            return False
    return True


def _numbers(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]
