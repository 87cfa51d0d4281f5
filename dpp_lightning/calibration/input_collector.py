"""What every weight sees as input: sums over calibration tokens, taken by hooks while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.tensors.names import canonical_names


@dataclass
class _Sums:
    """The running sums of one module."""

    name: str
    axis: int
    features: int
    embedding: bool
    total: Tensor
    squares: Tensor
    largest: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Sums:
        weight, embedding = module.weight, isinstance(module, nn.Embedding)
        axis = 1 if isinstance(module, nn.Linear) else 0
        features = int(weight.shape[axis])  # type: ignore[index,arg-type]
        return cls(name, axis, features, embedding, *torch.zeros(3, features, dtype=torch.float64))

    @torch.no_grad()
    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Inputs of one call: (..., features), or token numbers; those that ``mask`` hides do not count."""
        places = x.shape if self.embedding else x.shape[:-1]
        if mask is not None and places == mask.shape:
            x = x[mask.to(x.device)]
        if self.embedding:
            counts = torch.bincount(x.reshape(-1), minlength=self.features)[: self.features].double().cpu()
            self.total += counts
            self.squares += counts
            self.tokens += x.numel()
            return
        x = x.detach().reshape(-1, self.features).float()
        self.total += x.sum(0).double().cpu()
        self.squares += x.square().sum(0).double().cpu()
        if len(x):
            self.largest = torch.maximum(self.largest, x.abs().amax(0).double().cpu())
        self.tokens += len(x)


class InputCollector:
    """Collects the inputs of every Linear, Conv1D and Embedding of a model; made by :func:`collected_inputs`."""

    def __init__(self, module: nn.Module) -> None:
        names = canonical_names(module)
        self._sums: dict[nn.Module, _Sums] = {}
        self._mask: Tensor | None = None
        known: set[str] = set()
        for name, submodule in module.named_modules():
            weight = names.get(f"{name}.weight" if name else "weight")
            if weight is not None and weight not in known and _has_inputs(submodule):
                known.add(weight)  # a tied weight counts where it comes first
                self._sums[submodule] = _Sums.of(weight, submodule)

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """Canonical name of a weight to its inputs' sums; weights that no call reached are left out."""
        return {
            s.name: InputStatistics(
                s.total, s.squares, s.tokens, s.axis, s.embedding, None if s.embedding else s.largest
            )
            for s in self._sums.values()
            if s.tokens
        }

    @property
    def uncalled(self) -> list[str]:
        """Canonical names of the weights that no call reached, so that nothing is known of their inputs."""
        return [s.name for s in self._sums.values() if not s.tokens]

    def _see_mask(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask.bool()

    def _see_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if isinstance(x, Tensor) and x.numel():
            self._sums[module].add(x, self._mask)


@contextmanager
def collected_inputs(module: nn.Module) -> Iterator[InputCollector]:
    """Collect the inputs of every weight in all forward passes inside the block.

    Padding does not count where a module is called with ``attention_mask=`` of shape (samples, tokens), as the models
    of transformers are. Sums are float32 within a call and float64 over calls.

    Args:
        module: the model, of any kind; names are canonical.
    """
    collector = InputCollector(module)
    handles = [p.register_forward_pre_hook(collector._see_input, with_kwargs=True) for p in collector._sums]
    handles += [
        m.register_forward_pre_hook(collector._see_mask, with_kwargs=True)
        for m in module.modules()
        if next(m.children(), None) is not None
    ]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


def _has_inputs(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    known = isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"
    return known and isinstance(weight, Tensor) and weight.dim() == 2
