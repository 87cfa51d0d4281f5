"""One batch, one delta a row: the model's dense products once, each row's sparse changes beside them.

While a mixed batch is entered, every function of torch that the forward calls goes through it. Where one takes a tensor
that some row's delta changes, its result gets that row's change; a function for which that is not known is refused, so
that no row is ever computed with another's weights, or with the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dpp_lightning.serving.batch_rows import BatchRows
from dpp_lightning.serving.row_marks import RowMarks
from dpp_lightning.serving.sparse_products import (
    CannotMixError,
    Inputs,
    WeightChange,
    add_embedded,
    add_products,
)
from dpp_lightning.serving.unseen_uses import UnseenUses

# Names of the changed tensors that have gone through a forward in which all uses of them were seen.
_WATCHED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

_GETTERS = frozenset(  # of a tensor's attributes, those that tell nothing of its values
    {"dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_quantized",
     "is_sparse", "is_nested", "is_leaf", "grad", "grad_fn", "names", "itemsize", "nbytes", "is_mps", "is_xpu"}
)  # fmt: skip
_METADATA = frozenset(
    {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_floating_point, Tensor.is_complex,
     Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, Tensor.is_inference}
)  # fmt: skip


@dataclass
class _Changed:
    """A tensor that some delta of the batch changes.

    Attributes:
        name: for messages.
        tensor: the model's.
        changes: of each delta of the batch.
        stack: of a vector, that of each row, shape (rows, n), once it was used so.
        ndim: of a vector, the dimensions of what its module was called with last.
    """

    name: str
    tensor: Tensor
    changes: Sequence[WeightChange | None]
    stack: Tensor | None = None
    ndim: int | None = None


class MixedBatch(TorchFunctionMode):
    """Entered around a forward whose batch has one delta a row; the thread that entered it alone is concerned.

    Args:
        model: holds the base.
        rows: of the batch.
        changes: name, tensor of the model, and what each delta of ``rows`` changes of it.
        batch_first: names of the tensors that are known to meet the batch as first dimension; others are added.

    Raises:
        CannotMixError: a compiled model; inside the block, a function that takes a changed tensor and is not known
            here, or a batch that is not the first dimension.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: BatchRows,
        changes: Iterable[tuple[str, Tensor, Sequence[WeightChange | None]]],
        batch_first: set[str],
    ) -> None:
        super().__init__()
        self._rows, self._model, self._batch_first = rows, model, batch_first
        self._marks = RowMarks((*model.parameters(), *model.buffers()), rows.size)
        self._handles: list[RemovableHandle] = []
        self._changed = {id(tensor): _Changed(name, tensor, of_deltas) for name, tensor, of_deltas in changes}
        self._last: tuple[Tensor, int | None, Inputs] | None = None
        self._following = False
        self._unseen: UnseenUses | None = None

    def __enter__(self) -> MixedBatch:
        for module in self._model.modules():
            if _bypasses_python(module):
                raise CannotMixError(f"the model is compiled ({type(module).__name__})")
            vectors = [id(p) for p in module.parameters(recurse=False) if id(p) in self._changed and p.dim() == 1]
            if vectors and not any(True for _ in module.children()):  # its input is what they are combined with
                note = partial(self._note_dimensions, vectors)
                self._handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        names = {changed.name for changed in self._changed.values()}
        if not names <= _WATCHED.get(self._model, set()):
            tensors = [(changed.name, changed.tensor) for changed in self._changed.values()]
            self._unseen = UnseenUses(tensors, lambda: self._following)
            self._unseen.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._unseen is not None:
            self._unseen.__exit__(*exception)
            if not any(exception):
                _WATCHED.setdefault(self._model, set()).update(changed.name for changed in self._changed.values())
        while self._handles:
            self._handles.pop().remove()
        error = exception[1] if len(exception) > 1 else None
        if isinstance(error, Exception) and not isinstance(error, CannotMixError):
            error.add_note("in a mixed batch of several deltas: DeltaPool.use takes one at a time")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every function of torch, with this mode switched off."""
        kwargs = kwargs or {}
        named = self._first_of((*args, *kwargs.values()))
        if func in _METADATA or _is_getter(func):
            return func(*args, **kwargs)
        if named is None:
            result = func(*args, **kwargs)
            self._marks.note(func, args, kwargs, result)
            return result
        before, self._following = self._following, True
        try:
            return self._changed_result(named, func, args, kwargs)
        finally:
            self._following = before

    def _changed_result(
        self, named: _Changed, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a function that takes a changed tensor gives, with each row's change of it."""
        if self._first_of(kwargs.values()) is None:
            if func in _ELEMENTWISE:
                return func(*(self._broadcast(arg, args) for arg in args), **kwargs)
            if func in _CASTS and named.ndim is not None and self._first_of(args[1:]) is None:
                return func(self._as_rows(named, named.ndim), *args[1:], **kwargs)
        handler = _HANDLERS.get(func)
        if handler is None:
            called = getattr(func, "__name__", func)
            raise CannotMixError(f"{named.name} goes into {called}, which takes one weight for all rows")
        return handler(self, *args, **kwargs)

    def _first_of(self, args: Iterable[Any]) -> _Changed | None:
        """The first of the arguments, and of the lists among them, that a delta changes."""
        for arg in args:
            if isinstance(arg, Tensor):
                if id(arg) in self._changed:
                    return self._changed[id(arg)]
            elif isinstance(arg, (list, tuple)) and (found := self._first_of(arg)):
                return found
        return None

    def _note_dimensions(self, vectors: list[int], module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        for identity in vectors:
            self._changed[identity].ndim = None if inputs is None else inputs.dim()

    def _per_row(self, inputs: Tensor, *parameters: Tensor | None) -> Tensor:
        """A batch's tensor with its rows first, those that all rows share repeated.

        Args:
            inputs: what a function takes beside parameters.
            parameters: one of them at least is changed by a delta, for messages.

        Raises:
            CannotMixError: its first dimension is not the batch, or may be another.
        """
        name = self._name_of(inputs, *parameters)
        size, shape = self._rows.size, tuple(inputs.shape)
        numbers = inputs.is_floating_point()  # else ids, which have no features
        if shape[:1] == (1,):
            return inputs.expand(size, *shape[1:])
        self._check_rows(inputs, name)
        if shape == (size,) or (len(shape) > 1 + numbers and shape[1] == size):
            if name not in self._batch_first:
                either = f"{shape}, of which either dimension may be the {size} rows"
                raise CannotMixError(f"{name} got a tensor of shape {either}, until a batch of another length was seen")
        else:
            self._batch_first.add(name)
        return inputs

    def _check_rows(self, inputs: Tensor, name: str, *, places: bool = False) -> None:
        """Refuse inputs of a changed tensor whose first dimension is not the rows.

        Args:
            inputs: what a function takes beside parameters.
            name: of the changed tensor.
            places: the first dimension may be the rows' places, as many of each.

        Raises:
            CannotMixError: with the tensor's name.
        """
        size, shape = self._rows.size, tuple(inputs.shape)
        if not shape or (shape[0] % size if places else shape[0] != size):
            raise CannotMixError(f"{name} got a tensor of shape {shape} in a batch of {size} rows")
        if reason := self._marks.of(inputs):
            raise CannotMixError(f"{name} got a tensor that is {reason}, which is not the {size} rows")

    def _name_of(self, inputs: Tensor, *parameters: Tensor | None) -> str:
        """Of the first parameter that is changed.

        Raises:
            CannotMixError: the inputs are such a tensor themselves.
        """
        if found := self._first_of([inputs]):
            raise CannotMixError(f"{found.name} is used as the inputs of a function")
        changed = self._first_of(parameters)
        assert changed is not None  # why the function is here
        return changed.name

    def _as_rows(self, changed: _Changed, ndim: int | None) -> Tensor:
        """A vector as one for each row, shape (rows, 1, ..., n); of a tensor (1, ...), shape (rows, ...).

        Args:
            changed: the tensor.
            ndim: dimensions of what it is combined with.
        """
        tensor = changed.tensor
        if tensor.dim() != 1 and (tensor.shape[:1] != (1,) or ndim != tensor.dim()):
            raise CannotMixError(f"{changed.name}, of shape {tuple(tensor.shape)}, is used directly")
        if ndim is None or ndim < 2:
            raise CannotMixError(f"{changed.name} is used outside of its module's forward")
        if changed.stack is None:
            wholes = [None if change is None else change.whole for change in changed.changes]
            if any(whole is not None and whole.shape != tensor.shape for whole in wholes):
                raise CannotMixError(f"{changed.name} has other sizes in some deltas of the batch")
            changed.stack = self._rows.stacked(wholes, tensor)
        if tensor.dim() > 1:
            return changed.stack.flatten(0, 1)
        return changed.stack.view(self._rows.size, *(1,) * (ndim - 2), -1)

    def _broadcast(self, arg: Any, args: tuple[Any, ...]) -> Any:
        """An argument of an elementwise function, one for each row where a delta changes it."""
        changed = self._changed.get(id(arg)) if isinstance(arg, Tensor) else None
        if changed is None:
            return arg
        others = [other for other in args if isinstance(other, Tensor) and other is not arg]
        if not others:
            raise CannotMixError(f"{changed.name} is combined with a number")
        self._per_row(others[0], arg)
        return self._as_rows(changed, others[0].dim())

    def _expand(self, tensor: Tensor, *sizes: Any) -> Tensor:
        """``Tensor.expand`` to the rows of the batch, as of a class token."""
        sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        changed = self._changed[id(tensor)]
        if sizes[0] != self._rows.size:
            raise CannotMixError(f"{changed.name} is expanded to {sizes} in a batch of {self._rows.size} rows")
        return self._as_rows(changed, len(sizes)).expand(*sizes)

    def _convolution(
        self, function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *settings: Any
    ) -> Tensor:
        """A convolution with each row's weight and bias; a weight's changes are made dense, as kernels are small."""
        of_weight, of_bias = self._changed.get(id(weight)), self._changed.get(id(bias))
        name = self._name_of(input, weight, bias)
        if input.dim() != weight.dim():
            raise CannotMixError(f"{name} got a tensor of shape {tuple(input.shape)}, of one example")
        self._check_rows(input, name)
        outputs = function(input, weight, bias, *settings)
        for delta in range(len(self._rows.keys)):
            changes = [changed.changes[delta] if changed else None for changed in (of_weight, of_bias)]
            if any(changes):
                own = [
                    base if change is None or base is None else change.dense(base)
                    for change, base in zip(changes, (weight, bias), strict=True)
                ]
                rows = self._rows.of(delta)
                outputs[rows] = function(input[rows], *own, *settings)
        return outputs

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear`` with each row's weight and bias."""
        rows, changed = self._per_row(input, weight, bias), self._changed.get(id(weight))
        wholes = self._wholes(changed) if changed else {}
        if wholes:
            return self._with_whole_weights(rows, weight, bias, wholes)
        outputs = F.linear(rows, weight, bias)
        self._add_changes(rows, outputs, weight, bias)
        return outputs

    def _addmm(self, bias: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        """``torch.addmm`` as Conv1D of transformers calls it: the rows' places in one dimension."""
        changed, name = self._changed.get(id(weight)), self._name_of(inputs, weight, bias)
        self._check_rows(inputs, name, places=True)  # of two dimensions, as addmm takes no others
        if changed and self._wholes(changed):
            raise CannotMixError(f"{name} is carried whole by a delta")
        outputs = torch.addmm(bias, inputs, weight)
        self._add_changes(inputs, outputs, weight, bias, transposed=True)
        return outputs

    def _add_changes(
        self, inputs: Tensor, outputs: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False
    ) -> None:
        """Add what the rows' deltas change of a linear map to its outputs, in place."""
        none: list[WeightChange | None] = [None] * len(self._rows.keys)
        weights, biases = (self._changed.get(id(tensor)) for tensor in (weight, bias))
        add_products(
            self._inputs(inputs),
            outputs.view(self._rows.size, -1, outputs.shape[-1]),
            self._rows,
            weights.changes if weights else none,
            biases.changes if biases else none,
            transposed=transposed,
        )

    def _inputs(self, inputs: Tensor) -> Inputs:
        """The last inputs again where they are the same, as those of query, key and value are."""
        version = None if inputs.is_inference() else inputs._version
        if version is None or self._last is None or self._last[0] is not inputs or self._last[1] != version:
            self._last = inputs, version, Inputs(inputs, self._rows)
        return self._last[2]

    def _wholes(self, changed: _Changed) -> dict[int, Tensor]:
        """The deltas that have the tensor whole, such as a head."""
        return {d: c.whole for d, c in enumerate(changed.changes) if c is not None and c.whole is not None}

    def _with_whole_weights(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, wholes: dict[int, Tensor]
    ) -> Tensor:
        """``F.linear`` where some deltas have a weight of their own, all of one shape."""
        changed, of_bias = self._changed[id(weight)], self._changed.get(id(bias))
        some = next(iter(wholes.values()))
        covered = len(wholes) == len(self._rows.keys) and self._rows.covered
        shapes = {tensor.shape for tensor in wholes.values()} | (set() if covered else {weight.shape})
        if len(shapes) > 1:
            raise CannotMixError(f"{changed.name} has {len(shapes)} shapes among the deltas of the batch")
        if covered:
            outputs = inputs.new_empty(*inputs.shape[:-1], some.shape[0])
        else:
            outputs = F.linear(inputs, weight, bias)
            self._add_changes(inputs, outputs, weight, bias)
        for delta, whole in wholes.items():
            own = of_bias.changes[delta] if of_bias else None
            rows = self._rows.of(delta)
            outputs[rows] = F.linear(inputs[rows], whole, bias if own is None else own.whole)
        return outputs

    def _embedding(
        self, ids: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
    ) -> Tensor:
        """``F.embedding`` with each row's table."""
        rows, changed = self._per_row(ids, weight), self._changed[id(weight)]
        if max_norm is not None:
            raise CannotMixError(f"{changed.name} is an embedding with max_norm")
        wholes = self._wholes(changed)
        if any(whole.shape != weight.shape for whole in wholes.values()):  # ids may lie beyond the base's table
            raise CannotMixError(f"{changed.name} has other sizes in some deltas of the batch")
        outputs = F.embedding(rows, weight)
        for delta, change in enumerate(changed.changes):
            if change is not None:
                here = self._rows.of(delta)
                if change.whole is not None:
                    outputs[here] = F.embedding(rows[here], change.whole)
                    continue
                own = outputs[here]
                add_embedded(rows[here].reshape(-1), own.view(-1, own.shape[-1]), change)
                if not isinstance(here, slice):
                    outputs[here] = own
        return outputs

    def _layer_norm(
        self, inputs: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor:
        """``F.layer_norm`` over the last dimension with each row's weight and bias."""
        outputs = F.layer_norm(self._normed(inputs, shape, weight, bias), shape, eps=eps)
        return self._scaled(outputs, weight, bias)

    def _rms_norm(self, inputs: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        """``F.rms_norm`` over the last dimension with each row's weight."""
        return self._scaled(F.rms_norm(self._normed(inputs, shape, weight), shape, eps=eps), weight)

    def _normed(self, inputs: Tensor, shape: Any, *parameters: Any) -> Tensor:
        if len(shape) != 1:
            raise CannotMixError(f"{self._name_of(inputs, *parameters)} is of a norm over {len(shape)} dimensions")
        return self._per_row(inputs, *parameters)

    def _scaled(self, normed: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        weight, bias = (self._for_rows(parameter, normed.dim()) for parameter in (weight, bias))
        if weight is not None and bias is not None:
            return torch.addcmul(bias, normed, weight)
        return normed if weight is None else normed * weight

    def _for_rows(self, parameter: Tensor | None, ndim: int) -> Tensor | None:
        changed = self._changed.get(id(parameter))
        return parameter if changed is None else self._as_rows(changed, ndim)


def _bypasses_python(module: nn.Module) -> bool:
    """Whether functions of torch are called where they cannot be seen."""
    compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


def _is_getter(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") in _GETTERS  # type: ignore[attr-defined]


def _convolved(function: Callable[..., Tensor], batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
    return batch._convolution(function, *args, **kwargs)


_ELEMENTWISE = frozenset(
    {Tensor.mul, Tensor.add, Tensor.sub, Tensor.mul_, Tensor.add_, torch.mul, torch.add, torch.sub}
)
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.to, Tensor.type_as})
_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: MixedBatch._linear,
    F.embedding: MixedBatch._embedding,
    F.layer_norm: MixedBatch._layer_norm,
    F.rms_norm: MixedBatch._rms_norm,
    torch.addmm: MixedBatch._addmm,
    Tensor.expand: MixedBatch._expand,
    **{function: partial(_convolved, function) for function in (F.conv1d, F.conv2d, F.conv3d)},
}
