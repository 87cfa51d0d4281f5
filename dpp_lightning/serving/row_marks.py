"""Marks of tensors whose first dimension is not the rows of a batch, however long it is.

A mixed batch tells the rows by the length of a tensor's first dimension. Two kinds of tensors may have that length by
chance: what an index picked out of the rows, such as masked tokens or those of an expert, and what the model makes of
its own tensors alone, such as learned queries or a table of positions. Both are marked as they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_PICKED, _OWN = "picked by an index", "made of the model's own tensors alone"
_MARK = "_dpp_no_rows"
_PICKING = frozenset({torch.masked_select, Tensor.masked_select, torch.nonzero, Tensor.nonzero})
_BY_INDEX = frozenset({torch.index_select, Tensor.index_select})


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
        given = list(_tensors((*args, *kwargs.values())))
        if not given:
            return
        marks = [self._mark_of(tensor) for tensor in given]
        mark = _PICKED if _PICKED in marks or self._picks(func, args, kwargs) else None
        if mark is None and all(found == _OWN for found in marks):
            mark = _OWN
        if mark is not None:
            for tensor in _tensors((result,)):
                if not any(tensor is one for one in given):  # what was written in place stays what it was
                    setattr(tensor, _MARK, mark)

    def _mark_of(self, tensor: Tensor) -> str | None:
        return _OWN if id(tensor) in self._own else getattr(tensor, _MARK, None)

    def _picks(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function takes some of the rows, or all of them in another order; a table of the model has none."""
        if args and isinstance(args[0], Tensor) and self._mark_of(args[0]) == _OWN:
            return False
        if func in _PICKING:
            return True
        if func in _BY_INDEX:
            axis = args[1] if len(args) > 1 else kwargs.get("dim")
            index = args[2] if len(args) > 2 else kwargs.get("index")
            return axis == 0 and self._reorders(index)
        if func is not Tensor.__getitem__:
            return False
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(first, Tensor | list) and self._reorders(first)

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
