"""Products by a weight of which only some numbers are trained: gradients of these alone, none of the whole weight.

A kept entry (i, j) of W in y = x W^T has the gradient g = sum over tokens of gy_i x_j: as many products as there are
kept entries and tokens, where a dense gradient would be the product of the matrices. Beneath a product of factors
W = W_0 + B A the layer is y = x W_0^T + (x A^T) B^T, so that W itself is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_DENSE_FROM = 1 / 40  # of the entries kept: then the product of the matrices is quicker than that of the entries
_AT_ONCE = 1 << 16  # kept entries whose products with all tokens are in memory together
_LOOKS = (F.embedding, torch.embedding)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TURNED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))  # attributes that are products to be
# the first arguments of every call that is known, in order
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("bias", "input", "weight")),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), ("input", "weight")),
    F.embedding: ("input", "weight"),
    torch.embedding: ("weight", "input"),
    **dict.fromkeys(_CONVOLUTIONS, ("input", "weight")),
}


@dataclass
class TrainedWeight:
    """The numbers of one weight that are trained; they may be on another device than the weight while that is used.

    Attributes:
        positions: flat positions of the kept entries, int64, sorted, shape (kept,).
        values: their deltas, shape (kept,); the weight itself holds them too, as they are rounded; None for none.
        left, right: factors of shape (rows, rank) and (rank, columns), whose product the weight does not hold; None
            for none.
    """

    positions: Tensor
    values: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None

    def product(self, weight: Tensor) -> Tensor:
        """The product of the factors, of the weight's shape and dtype."""
        assert self.left is not None
        assert self.right is not None
        return (self.left @ self.right).view(weight.shape).to(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
        """``x @ weight.T + bias``, or ``x @ weight + bias`` for a weight of shape (in, out)."""
        if self.values is None:
            y = F.linear(x, weight if transposed else weight.t(), bias)
        else:  # a matrix, no view of one, as a caller may change it in place
            rows = _KeptProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias, self.values, self.positions, transposed)
            y = rows.view(*x.shape[:-1], rows.shape[-1])
        if self.left is None or self.right is None:
            return y
        first, second = (self.right, self.left) if transposed else (self.left.t(), self.right.t())
        return y + F.linear(F.linear(x, first.to(x)), second.to(x))

    def looked_up(self, rows: Tensor, weight: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of the weight; ``call`` looks them up in a table."""
        y = call(weight)
        if self.values is not None:
            y = _KeptRows.apply(y, rows, weight.shape, self.values, self.positions)
        if self.left is None or self.right is None:
            return y
        return y + (F.embedding(rows, self.left.to(y.device)) @ self.right.to(y.device)).to(y.dtype)

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight of a convolution with gradients to the trained numbers, by way of one dense gradient at a time."""
        if self.values is not None:
            change = (self.values - self.values.detach()).to(weight)
            zeros = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
            weight = weight + zeros.index_add(0, self.positions.to(weight.device), change).view(weight.shape)
        return weight if self.left is None else weight + self.product(weight)


class KeptProducts(TorchFunctionMode):
    """While it is active, products by some weights have gradients to their trained numbers.

    Args:
        weights: identity of a weight, as ``id`` gives it, to its trained numbers.

    """

    def __init__(self, weights: Mapping[int, TrainedWeight]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self._watched: set[int] = set()
        self._unknown: set[int] = set()

    def unknown_in(self, run: Callable[[], Any]) -> set[int]:
        """Identities of weights that are used in calls that are not known here, so that their gradient is to be taken
        of the whole weight.

        Args:
            run: makes the calls, while this is active.
        """
        self._watched, self._unknown = set(self.weights), set()
        try:
            run()
        finally:
            self._watched = set()
        return self._unknown

    @contextmanager
    def again(self) -> Iterator[None]:
        """Active for layers that are computed anew in the backward pass, which runs outside of modes or in another
        thread; nothing where it is active already."""
        if any(mode is self for mode in _get_current_function_mode_stack()):
            yield
            return
        with self:
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = self._known(func, args, kwargs)
        if known is not None:
            return known()
        if self._watched and (func in _TURNED or getattr(func, "__name__", "") != "__get__"):
            self._unknown |= {id(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)} & self._watched
        return func(*args, **kwargs)

    def _known(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Tensor] | None:
        """The call with gradients to trained numbers; None where no such weight is in it, or it is another call."""
        names = _ARGUMENTS.get(func)
        if names is None:
            return None
        given: dict[str, Any] = {n: args[i] if i < len(args) else kwargs.get(n) for i, n in enumerate(names)}
        weight = given["weight"]
        part = self.weights.get(id(weight))
        if part is None or {"alpha", "beta"} & kwargs.keys():
            return None
        if func in _LOOKS:
            return partial(part.looked_up, given["input"], weight, _call(func, names, args, kwargs))
        if func in _CONVOLUTIONS:
            call = _call(func, names, args, kwargs)
            return lambda: call(part.kernel(weight))
        if weight.dim() != 2:
            return None
        return partial(part.linear, given["input"], weight, given.get("bias"), transposed=func is F.linear)


def _call(
    func: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """The call as a function of its weight."""
    at = names.index("weight")

    def call(weight: Tensor) -> Tensor:
        if at < len(args):
            return func(*args[:at], weight, *args[at + 1 :], **kwargs)
        return func(*args, **{**kwargs, "weight": weight})

    return call


class _KeptProduct(torch.autograd.Function):
    """``x @ weight.T + bias`` with gradients of x, the bias and the kept entries."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, positions: Tensor, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, positions)
        ctx.transposed, ctx.like = transposed, (values.device, values.dtype)
        return F.linear(x, weight if transposed else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        gy = gradients[0]  # under autocast of a narrower dtype than x and the weight, which are cast as it casts them
        x, weight, positions = ctx.saved_tensors
        x, weight = x.to(gy.dtype), weight.to(gy.dtype)
        of_x = of_bias = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = gy @ weight if ctx.transposed else gy @ weight.t()
        if ctx.needs_input_grad[2]:
            of_bias = gy.sum(0)
        if ctx.needs_input_grad[3]:
            rows, columns = (gy, x) if ctx.transposed else (x, gy)
            of_values = products_at(rows, columns, positions.to(gy.device)).to(*ctx.like)
        return of_x, None, of_bias, of_values, None, None


class _KeptRows(torch.autograd.Function):
    """Rows of a table as they are, with gradients of its kept entries."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, shape: torch.Size, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(rows, positions.to(y.device))
        ctx.columns, ctx.like = shape[1], (values.device, values.dtype)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        rows, positions = ctx.saved_tensors
        gy = gradients[0].reshape(-1, ctx.columns)
        used, inverse = torch.unique(rows.reshape(-1), return_inverse=True)
        sums = gy.new_zeros(len(used), ctx.columns).index_add_(0, inverse, gy)
        row, column = positions // ctx.columns, positions % ctx.columns
        at = torch.searchsorted(used, row).clamp_(max=len(used) - 1)
        found = torch.where(used[at] == row, sums[at, column], torch.zeros((), dtype=sums.dtype, device=sums.device))
        return gradients[0], None, None, found.to(*ctx.like), None


def products_at(rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    """Entries of ``rows.T @ columns`` at flat positions, shape (kept,).

    Args:
        rows: shape (tokens, n).
        columns: shape (tokens, m).
        positions: in C order of (n, m), int64, shape (kept,).
    """
    width = columns.shape[1]
    if len(positions) > _DENSE_FROM * rows.shape[1] * width:
        return (rows.t() @ columns).view(-1)[positions]
    of_rows, of_columns = rows.t().contiguous(), columns.t().contiguous()
    parts = [(of_rows[part // width] * of_columns[part % width]).sum(1) for part in positions.split(_AT_ONCE)]
    return torch.cat(parts) if parts else rows.new_empty(0)
