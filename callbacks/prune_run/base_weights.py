"""The base of a fine-tuning run, where it is found, and how it is exchanged with the fine-tuned weights in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.names import (
    canonical_names,
    canonical_tensors,
    check_prunable,
    match_names,
    without_adapters,
)
from dpp_lightning.tensors.shards import shard_like


class BaseWeights:
    """theta_0 of one LightningModule, under canonical names.

    It comes from a checkpoint (``pretrained``), else from the module's values before training; where an optimizer holds
    theta_0 as AdamR does (``state[p]["pretrained"]``) in the parameter's dtype, that very tensor is used and no second
    copy kept.

    Args:
        tensors: canonical name to theta_0.
        explicit: they come from a checkpoint the user named, so nothing else may replace them.
    """

    def __init__(self, tensors: dict[str, Tensor], *, explicit: bool) -> None:
        self.tensors = tensors
        self.explicit = explicit

    @classmethod
    def take(cls, module: pl.LightningModule, pretrained: str | None, revision: str | None) -> BaseWeights:
        """The base from the checkpoint the user named, else the module's present values.

        Raises:
            ValueError: parameters that cannot be pruned (meta, quantised, integer, shards of FSDP1), or a checkpoint
                without a tensor in common.
            FileNotFoundError: no such checkpoint.
        """
        check_prunable(canonical_tensors(module))
        return cls.from_module(module) if pretrained is None else cls.from_checkpoint(module, pretrained, revision)

    @classmethod
    def from_checkpoint(cls, module: pl.LightningModule, pretrained: str, revision: str | None) -> BaseWeights:
        """Load a local folder, file or hub id and match it with the module's tensors.

        Raises:
            ValueError: nothing matches by name and shape.
            FileNotFoundError: no such checkpoint.
        """
        loaded = canonical_tensors(load_tensors(pretrained, revision))
        own = canonical_tensors(module)
        plain = {name: without_adapters(name) for name in own}
        found = match_names(set(plain.values()), loaded)
        matched = {name: loaded[found[other]] for name, other in plain.items() if other in found}
        matched = {name: t.clone() for name, t in matched.items() if t.shape == own[name].shape}
        if not matched:
            raise ValueError(
                f"pretrained={pretrained!r} has no tensor in common with {type(module).__name__}: its names begin with "
                f"{sorted(loaded)[:3]}, the module's with {sorted(own)[:3]}"
            )
        return cls(matched, explicit=True)

    @classmethod
    def from_module(cls, module: pl.LightningModule) -> BaseWeights:
        """Copy the module's present values."""
        return cls({n: t.detach().clone() for n, t in canonical_tensors(module).items()}, explicit=False)

    def adopt_optimizer_copies(
        self, module: pl.LightningModule, optimizers: Iterable[Optimizer], *, verified: bool = False
    ) -> None:
        """Use theta_0 out of the optimizers' state in place of own copies.

        A copy narrower than its parameter (AdamR's in bfloat16) may be rounded, so it replaces no own one. Nor would an
        exact one save memory: what is exchanged with the weights needs their dtype. A tensor that nothing else knows
        stays unknown, to be refused, unless the caller is going to verify it.

        Args:
            module: whose parameters they are.
            optimizers: of any kind.
            verified: the fingerprint will be compared with that of the base which training started from.
        """
        if self.explicit:
            return
        names = {id(t): name for name, t in canonical_tensors(module).items()}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                name = names.get(id(parameter))
                copy = state.get("pretrained") if isinstance(state, dict) else None
                if name is None or not isinstance(copy, Tensor):
                    continue
                exact = torch.promote_types(copy.dtype, parameter.dtype) == copy.dtype
                if exact or (verified and name not in self.tensors):
                    self.tensors[name] = copy

    def settle(self, module: pl.LightningModule) -> None:
        """Bring every tensor to the dtype of the module's and share it out alike, as either may have changed since."""
        own = canonical_tensors(module)
        self.tensors = {n: shard_like(t.to(own[n].dtype), own[n]) for n, t in self.tensors.items() if n in own}

    def fingerprint(self, module: pl.LightningModule, new: set[str], carry: Iterable[str]) -> str:
        """xxh3-128 over theta_0 of the module's parameters.

        Left out are heads, new or carried by a glob pattern of ``carry``: their first values mean nothing.
        """
        names = {n for n, t in canonical_tensors(module).items() if isinstance(t, Parameter) and n in self.tensors}
        patterns = tuple(carry)
        skipped = {n for n in names if n in new or any(fnmatchcase(n, p) for p in patterns)}
        return hash_tensors({name: self.tensors[name] for name in sorted(names - skipped)})  # in one order on all ranks

    @contextmanager
    def exchanged(self, module: pl.LightningModule, names: Iterable[str]) -> Iterator[None]:
        """Inside the block the module holds theta_0 and this object the fine-tuned values, tensor by tensor.

        No third copy of the model is made, and the exchange back restores both sides bit for bit, also after an
        exception.
        """
        own, done = canonical_tensors(module), []
        try:
            for name in names:
                _swap(own[name], self.tensors[name])
                done.append(name)
            yield
        finally:
            for name in done:
                _swap(own[name], self.tensors[name])


def new_names(module: pl.LightningModule, optimizers: Iterable[Optimizer]) -> set[str]:
    """Canonical names of the parameters that were new in this training, such as a fresh head.

    They are told by the module (``new_parameter_names``) and by optimizer groups with ``new=True``; never guessed.
    """
    own = canonical_names(module)
    told = [n for name in getattr(module, "new_parameter_names", ()) for n in (name, without_adapters(name))]
    names = {own[name] for name in told if name in own}
    by_tensor = {id(t): name for name, t in canonical_tensors(module).items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if group.get("new"):
                names |= {by_tensor[id(p)] for p in group["params"] if id(p) in by_tensor}
    return names


def has_weights(module: pl.LightningModule) -> bool:
    """Whether the module holds materialised parameters by now (one with ``configure_model`` may not)."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.is_meta or isinstance(p, torch.nn.UninitializedParameter) for p in parameters)


@torch.no_grad()
def _swap(a: Tensor, b: Tensor) -> None:
    kept = a.detach().clone()
    a.detach().copy_(b)
    b.detach().copy_(kept)
