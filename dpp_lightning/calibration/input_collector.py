"""What every weight sees as input: sums over calibration tokens, taken from the calls that multiply by weights."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpp_lightning.calibration.padding import RunningModules
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.tensors.hf_layout import transformers_models
from dpp_lightning.tensors.names import NamedTensor, named_tensors

Kind = Literal["linear", "embedding"]

_EMBEDDINGS = (F.embedding, F.embedding_bag)
_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
_SHIFTED_PRODUCTS = (torch.addmm, Tensor.addmm)


@dataclass
class _Sums:
    """The running sums of one weight, of shape (features,) or (experts, features)."""

    kind: Kind
    axis: int
    total: Tensor
    squares: Tensor
    largest: Tensor
    tokens: int = 0
    products: Tensor | None = None

    @classmethod
    def of(cls, kind: Kind, axis: int, shape: tuple[int, ...], *, products: bool = False) -> _Sums:
        """Nothing summed yet; products are those of a single linear map."""
        sums = cls(kind, axis, *torch.zeros(3, *shape, dtype=torch.float64))
        if products and kind == "linear" and len(shape) == 1:
            sums.products = torch.zeros(*shape, *shape, dtype=torch.float64)
        return sums

    @torch.no_grad()
    def add_products(self, x: Tensor, expert: int | None) -> None:
        """Inputs of one call, shape (tokens, features), of one of the experts where there are several."""
        at = ... if expert is None else expert
        self.total[at] += x.sum(0).double().cpu()
        self.squares[at] += x.square().sum(0).double().cpu()
        if len(x):
            self.largest[at] = torch.maximum(self.largest[at], x.abs().amax(0).double().cpu())
        if self.products is not None:
            self.products += (x.t() @ x).double().cpu()
        self.tokens += len(x)

    @torch.no_grad()
    def add_tokens(self, tokens: Tensor) -> None:
        """Numbers of rows that are looked up, of any shape."""
        counts = torch.bincount(tokens.reshape(-1), minlength=len(self.total))[: len(self.total)].double().cpu()
        self.total += counts
        self.squares += counts
        self.tokens += tokens.numel()

    @property
    def statistics(self) -> InputStatistics:
        """The sums as they are now."""
        embedding, largest = self.kind == "embedding", self.largest.clone()
        products = None if self.products is None else self.products.clone()
        return InputStatistics(
            self.total.clone(),
            self.squares.clone(),
            self.tokens,
            self.axis,
            embedding,
            None if embedding else largest,
            products,
        )


class InputCollector(TorchFunctionMode):
    """Collects the inputs of every weight of a model that is a matrix; made by :func:`collected_inputs`.

    It sees the calls of torch that multiply by a weight or look rows of it up, whichever module makes them.
    """

    def __init__(self, module: nn.Module, *, products: bool = False) -> None:
        super().__init__()
        self.running, self.products = RunningModules(), products
        self.unknown_padding: set[str] = set()
        self._sums: dict[str, dict[tuple[Kind, int], _Sums]] = {}
        self._parts: dict[int, list[NamedTensor]] = {}  # of a parameter, by its id
        for named in named_tensors(module):
            self._parts.setdefault(id(named.owner), []).append(named)
        self._owners = {id(p): p for p in module.parameters() if id(p) in self._parts}
        # a strategy may put other parameters in place of a module's own while it runs
        self._of_module = {
            (id(child), name): self._parts[id(p)]
            for child in module.modules()
            for name, p in child._parameters.items()
            if id(p) in self._parts
        }

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """Canonical name of a weight to its inputs' sums; weights that no call reached are left out.

        A weight that is called in several places has the sums of all of them. One that is a table of rows in one place
        and a linear map in another, as an embedding that is tied to the head, has those of the linear map.
        """
        statistics = {}
        for name, uses in self._sums.items():
            called = [sums for sums in uses.values() if sums.tokens]
            if called:
                best = max(called, key=lambda sums: (sums.kind == "linear", sums.tokens, sums.axis))
                statistics[name] = best.statistics
        return statistics

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            self._see_product(*_first(("input", "weight"), args, kwargs), transposed=True)
        elif func in _PRODUCTS:
            x, weight = _first(("input", "other"), args, kwargs)
            self._see_product(x, kwargs.get("mat2", weight), transposed=False)
        elif func in _SHIFTED_PRODUCTS:
            self._see_product(*_first(("input", "mat1", "mat2"), args, kwargs)[1:], transposed=False)
        elif func in _EMBEDDINGS:
            self._see_tokens(*_first(("input", "weight"), args, kwargs))
        elif func is Tensor.__getitem__:
            self._see_rows(*args)
        elif func is F.multi_head_attention_forward:
            with self, self.running.time_major():
                return _from_inside(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _see_product(self, x: Any, weight: Any, *, transposed: bool) -> None:
        """``x @ weight``, or ``x @ weight.T``."""
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or min(x.dim(), weight.dim()) < 1:
            return
        if weight.dim() == 3 and x.dim() == 3 and len(x) == len(weight) and self._find(weight) is not None:
            for inputs, expert in zip(x, weight, strict=True):
                self._see_product(inputs, expert, transposed=transposed)
        elif weight.dim() == 2 and (found := self._find(weight)) is not None:
            self._add_products(x, weight, 1 if transposed else 0, *found)
        elif not transposed and x.dim() == 2 and weight.dim() > 1 and (found := self._find(x)) is not None:
            self._add_products(weight.transpose(-1, -2), x, 1, *found)  # the weight stands on the left

    def _add_products(self, x: Tensor, weight: Tensor, axis: int, owner: Tensor, parts: list[NamedTensor]) -> None:
        places = [(part.name, place) for part in parts if (place := _place(part, owner, weight, axis)) is not None]
        if not places or not x.numel() or x.shape[-1] != weight.shape[axis]:
            return
        mask, known = self.running.counted(x, tuple(x.shape[:-1]))
        x = (x if mask is None else x[mask.to(x.device)]).detach().reshape(-1, x.shape[-1]).float()
        for name, place in places:
            shape = (weight.shape[axis],) if place.expert is None else (place.experts, weight.shape[axis])
            self._sums_of(name, "linear", place.axis, shape).add_products(x, place.expert)
            if not known:
                self.unknown_padding.add(name)

    def _see_tokens(self, tokens: Any, weight: Any) -> None:
        """Rows of ``weight`` are looked up."""
        if not isinstance(tokens, Tensor) or not isinstance(weight, Tensor) or not tokens.numel():
            return
        found = self._find(weight)
        if found is None or tokens.is_floating_point() or tokens.dtype == torch.bool:
            return
        self.running.turn_round(tokens)
        tokens, mask = self.running.counted_tokens(tokens)
        tokens = tokens if mask is None else tokens[mask.to(tokens.device)]
        for part in found[1]:
            place = _place(part, found[0], weight, 0)
            if place is not None and place.axis == 0:
                self._sums_of(part.name, "embedding", 0, (weight.shape[0],)).add_tokens(tokens)

    def _sums_of(self, name: str, kind: Kind, axis: int, shape: tuple[int, ...]) -> _Sums:
        uses = self._sums.setdefault(name, {})
        if (kind, axis) not in uses:
            uses[kind, axis] = _Sums.of(kind, axis, shape, products=self.products)
        return uses[kind, axis]

    def _see_rows(self, table: Any, rows: Any) -> None:
        """``table[rows]``: of an embedding's weight a look-up, of tokens a choice among them."""
        module = self.running.frames[-1].module if self.running.frames else None
        if isinstance(module, nn.Embedding) and table is module.weight:
            if isinstance(rows, slice):
                rows = torch.arange(*rows.indices(len(table)), device=table.device)
            self._see_tokens(rows, table)
        else:
            self.running.select(table, rows)

    def _find(self, weight: Tensor) -> tuple[Tensor, list[NamedTensor]] | None:
        """The parameter that a tensor is, or is a view of, and what the model's files call its parts."""
        for candidate in (weight, weight._base):
            if candidate is not None and id(candidate) in self._owners:
                return candidate, self._parts[id(candidate)]
        for frame in reversed(self.running.frames):
            for name, parameter in frame.module._parameters.items():
                if parameter is not None and _holds(parameter, weight):
                    parts = self._of_module.get((id(frame.module), name))
                    return None if parts is None else (parameter, parts)
        return None


@contextmanager
def collected_inputs(module: nn.Module, *, products: bool = False) -> Iterator[InputCollector]:
    """Collect the inputs of every matrix among the weights in all forward passes inside the block.

    Seen are linear maps and embeddings in whatever module they are, an expert of a mixture as a part of the tensor of
    all of them, and weights that several modules share. Padding does not count as far as the masks tell that modules
    are called with: ``attention_mask`` and its kin of shape (samples, tokens), as the models of transformers have them,
    and torch's ``src_key_padding_mask``; a warning says of which layers it is not known. Compiled modules run as if
    they were not. Sums are float32 within a call and float64 over calls.

    Args:
        module: the model, of any kind; names are canonical.
        products: sum the products of every two features too, of linear maps: the square of their number in memory.
    """
    collector = InputCollector(module, products=products)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_experts_apart(transformers_models(module).values()))
        stack.enter_context(collector.running.followed(module))
        stack.enter_context(collector)
        yield collector
    if collector.unknown_padding:
        names = sorted(collector.unknown_padding)
        warnings.warn(
            f"which inputs of {len(names)} weights are padding is not known, so all of them count: "
            f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}",
            stacklevel=3,
        )


@contextmanager
def _experts_apart(models: Iterable[Any]) -> Iterator[None]:
    """Have the experts of a mixture called one after the other, so that each one's inputs are seen."""
    before = [(model, model.get_experts_implementation()) for model in models]
    try:
        for model, implementations in before:
            model.set_experts_implementation(dict.fromkeys(implementations, "eager"))
        yield
    finally:
        for model, implementations in before:
            model.set_experts_implementation(implementations)


def _from_inside(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` whose own calls of torch are seen, where it would be seen as one call."""
    inside = {**func.__globals__, "has_torch_function": lambda _tensors: False}  # type: ignore[attr-defined]
    return types.FunctionType(
        func.__code__,  # type: ignore[attr-defined]
        inside,
        func.__name__,
        func.__defaults__,  # type: ignore[attr-defined]
    )


def _first(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The leading arguments of a call, each given by place or by name."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _holds(parameter: Tensor, weight: Tensor) -> bool:
    """Whether a tensor lies within a parameter's memory."""
    if parameter is weight:
        return True
    try:
        start = weight.storage_offset() - parameter.storage_offset()
        return bool(
            weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr() != 0
            and weight.dtype == parameter.dtype
            and start >= 0
            and start + _extent(weight.shape, weight.stride()) <= _extent(parameter.shape, parameter.stride())
        )
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        return False


@dataclass(frozen=True)
class _Place:
    """What a matrix that is multiplied by is of a weight: its features' dimension, and which of the experts it is."""

    axis: int
    expert: int | None = None
    experts: int = 0


def _place(part: NamedTensor, owner: Tensor, weight: Tensor, axis: int) -> _Place | None:
    """What ``weight``, whose dimension ``axis`` are the features, is of a part of ``owner``; None where it is less than
    one linear map of it."""
    place = part.place
    size, stride = (owner.shape, owner.stride()) if place.size is None else (place.size, place.stride)
    if size is None or stride is None or len(size) not in (2, 3):
        return None
    first: int = place.offset
    expert: int | None = None
    start = int(weight.storage_offset() - owner.storage_offset())
    if len(size) == 3:
        expert = int((start - first) // max(stride[0], 1))
        first += expert * stride[0]
        if not 0 <= expert < size[0]:
            return None
    within = start <= first <= first + _extent(size[-2:], stride[-2:]) <= start + _extent(weight.shape, weight.stride())
    if not within or (len(size) == 3 and weight.shape.numel() != size[-2] * size[-1]):
        return None
    for i in (len(size) - 1, len(size) - 2):
        joined = bool(part.more) and i == 0  # features must be those of all that the files hold as one
        if not joined and size[i] == weight.shape[axis] and stride[i] == weight.stride(axis):
            return _Place(i, expert, size[0] if expert is not None else 0)
    return None


def _extent(size: Iterable[int], stride: Iterable[int]) -> int:
    """How many entries of memory a tensor spans."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
