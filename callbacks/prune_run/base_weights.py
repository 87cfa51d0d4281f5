"""The base weights of a fine-tuning run: where they come from, and how they change places with the fine-tuned ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dpp_lightning.callbacks.prune_run.exchange import Exchange
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.pruning.shape_check import check_shapes
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import (
    canonical_tensors,
    check_prunable,
    named_tensors,
    owners,
    without_adapters,
)
from dpp_lightning.tensors.shards import shard_like

ASK_FOR_PRETRAINED = "pretrained=<folder or hub id of the base>"


class BaseWeights:
    """theta_0 of one module, by canonical name.

    It comes from the checkpoint that the user named (``pretrained``), else from the values that the module has before
    training. Where an optimizer holds theta_0 in the parameter's dtype, as AdamR does in ``state[p]["pretrained"]``,
    that tensor itself is used, so that no second copy takes memory.

    Args:
        tensors: canonical name to theta_0.
        explicit: they come from a checkpoint that the user named, so nothing else may replace them.
        saved: canonical name to the name in that checkpoint.
    """

    def __init__(self, tensors: dict[str, Tensor], *, explicit: bool, saved: Mapping[str, str] | None = None) -> None:
        self.tensors = tensors
        self.explicit = explicit
        self.saved = dict(saved or {})

    @classmethod
    def take(cls, module: nn.Module, pretrained: str | None, revision: str | None, scope: Scope) -> BaseWeights:
        """The base from the checkpoint that the user named, else the module's present values.

        Raises:
            ValueError: if the module has parameters that cannot be pruned (meta, quantised, integer, shards of FSDP1),
                or the checkpoint no tensor in common with it.
            FileNotFoundError: if there is no such checkpoint.
        """
        check_prunable(canonical_tensors(module))
        if pretrained is None:
            return cls.from_module(module)
        return cls.from_checkpoint(module, pretrained, revision, scope)

    @classmethod
    def from_checkpoint(cls, module: nn.Module, pretrained: str, revision: str | None, scope: Scope) -> BaseWeights:
        """Load a local folder, file or hub id and match its tensors with the module's.

        Raises:
            ValueError: if no tensor matches by name and shape, or the shapes are those of another model.
            FileNotFoundError: if there is no such checkpoint.
        """
        check_model(pretrained, "pretrained", revision)
        loaded = {n.name: n for n in named_tensors(load_tensors(pretrained, revision), like=module)}
        module_tensors = canonical_tensors(module)
        plain_names = {name: without_adapters(name) for name in module_tensors}
        loaded_names = match_names(set(plain_names.values()), loaded)
        matched = {name: loaded[loaded_names[plain]] for name, plain in plain_names.items() if plain in loaded_names}
        check_shapes({name: n.tensor for name, n in matched.items()}, module_tensors, scope)
        matched = {name: n for name, n in matched.items() if n.tensor.shape == module_tensors[name].shape}
        if not matched:
            raise ValueError(
                f"pretrained={pretrained!r} has no tensor in common with {type(module).__name__}: its names begin with "
                f"{sorted(loaded)[:3]}, the module's with {sorted(module_tensors)[:3]}"
            )
        tensors = {name: n.tensor.clone() for name, n in matched.items()}
        return cls(tensors, explicit=True, saved={name: n.saved for name, n in matched.items()})

    @classmethod
    def from_module(cls, module: nn.Module) -> BaseWeights:
        """Copy the module's present values."""
        return cls({n: t.detach().clone() for n, t in canonical_tensors(module).items()}, explicit=False)

    def adopt_optimizer_copies(
        self, module: nn.Module, optimizers: Iterable[Optimizer], *, verified: bool = False
    ) -> None:
        """Take theta_0 from the optimizers' state where they hold it, and let go of the copies made here.

        A copy in a narrower dtype than its parameter's (AdamR's in bfloat16) may be rounded, so it does not replace a
        copy made here. Nor would it save memory if it were exact, since what changes places with the weights must have
        their dtype. A rounded copy is used only where nothing else is known of the tensor and ``verified`` is true.

        Args:
            module: has the parameters.
            optimizers: of any kind.
            verified: the caller will compare the fingerprint with that of the base which the training started from.
        """
        if self.explicit:
            return
        copies: dict[int, Tensor] = {}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                copy = state.get("pretrained") if isinstance(state, dict) else None
                if isinstance(copy, Tensor):
                    copies[id(parameter)] = copy
        for named in named_tensors(module):
            held = [copies.get(id(owner)) for owner, _ in named.pieces]
            if any(copy is None for copy in held):
                continue
            exact = all(
                torch.promote_types(copy.dtype, named.owner.dtype) == copy.dtype for copy in held if copy is not None
            )
            if exact or (verified and named.name not in self.tensors):
                self.tensors[named.name] = named.of(copies)

    def convert_like(self, module: nn.Module) -> None:
        """Give every tensor the dtype and the shards of the module's: either may have changed since it was taken.

        Values that the dtype rounds are warned of: the deltas do not fit the base as it was then.
        """
        like = canonical_tensors(module)
        rounded = next((n for n, t in self.tensors.items() if n in like and _rounds(t, like[n].dtype)), None)
        if rounded is not None:
            rank_zero_warn(
                f"the module holds {rounded} and others in {like[rounded].dtype}, which rounds the base's values: the "
                "deltas fit the base cast to it, and not the base as it is; cast the base, or train with bf16-mixed"
            )
        self.tensors = {n: shard_like(t.to(like[n].dtype), like[n]) for n, t in self.tensors.items() if n in like}

    def check_complete(self, module: nn.Module, new: set[str]) -> None:
        """Refuse a base that lacks tensors which are trained and not new.

        A checkpoint that the user named may lack tensors: they are the new ones then.

        Args:
            module: holds the parameters.
            new: canonical names of the parameters that were new in this training.

        Raises:
            ValueError: if the checkpoint's weights were restored before the base could be copied.
        """
        trained = {name for name, owner in owners(module).items() if owner.requires_grad}
        missing = sorted(trained - new - set(self.tensors))
        if missing and not self.explicit:
            raise ValueError(
                f"the base's values of {len(missing)} tensors are unknown ({', '.join(missing[:3])}): the checkpoint's "
                f"weights were restored before they could be seen. Pass {ASK_FOR_PRETRAINED}"
            )

    def fingerprint(self, module: nn.Module, new: set[str], carry: Iterable[str]) -> str:
        """xxh3-128 over theta_0 of the module's parameters.

        Heads are left out, since their first values mean nothing: the parameters in ``new``, and those that a glob
        pattern of ``carry`` names.
        """
        names = {n for n, owner in owners(module).items() if isinstance(owner, Parameter) and n in self.tensors}
        patterns = tuple(carry)
        heads = {n for n in names if n in new or any(fnmatchcase(n, p) for p in patterns)}
        return hash_tensors({name: self.tensors[name] for name in sorted(names - heads)})  # in one order on all ranks

    def verified_fingerprint(self, module: nn.Module, new: set[str], carry: Iterable[str], expected: str | None) -> str:
        """The fingerprint, if it is that of the base which a restored checkpoint's training started from.

        Args:
            module, new, carry: see :meth:`fingerprint`.
            expected: the fingerprint in the checkpoint; None where no checkpoint was restored.

        Raises:
            ValueError: if the fingerprints differ.
        """
        fingerprint = self.fingerprint(module, new, carry)
        if expected is not None and fingerprint != expected:
            raise ValueError(
                f"the base now seen (fingerprint {fingerprint}) is not the one the checkpoint's training started from "
                f"({expected}); build the module from the original base, or pass {ASK_FOR_PRETRAINED}"
            )
        return fingerprint

    @contextmanager
    def exchanged(self, module: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Inside the block the module holds theta_0 and this object the fine-tuned values.

        They change places tensor by tensor, so no third copy of the model is made. After the block, and after an
        exception or interrupt too, both are as before, bit for bit.
        """
        named = {n.name: n for n in named_tensors(module)}
        exchange = Exchange({name: (named[name], self.tensors[name]) for name in names})
        with restored_after(exchange.put_back):
            for name in exchange.names:
                exchange.exchange(name)
            yield


def declared(module: nn.Module, name: str) -> str | None:
    """What a module says of its base under ``pretrained`` or ``revision``: a text or a path; else it is a flag or a
    part of the module that has this name by chance, and says nothing."""
    value = getattr(module, name, None)
    return str(value) or None if isinstance(value, str | Path) else None


def _rounds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a floating-point tensor has values that a narrower dtype has not."""
    narrower = tensor.is_floating_point() and dtype.is_floating_point and dtype.itemsize < tensor.dtype.itemsize
    return narrower and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def new_names(module: nn.Module, optimizers: Iterable[Optimizer]) -> set[str]:
    """Canonical names of the parameters that were new in this training, such as a fresh head.

    The module names them in ``new_parameter_names``, an optimizer by a group with ``new=True``. Nothing is guessed.
    """
    declared = [n for name in getattr(module, "new_parameter_names", ()) for n in (name, without_adapters(name))]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    new = {id(parameters[name]) for name in declared if name in parameters}
    for optimizer in optimizers:
        new |= {id(p) for group in optimizer.param_groups if group.get("new") for p in group["params"]}
    return {name for name, owner in owners(module).items() if id(owner) in new}


def has_weights(module: nn.Module) -> bool:
    """Whether the module holds materialised parameters by now (one with ``configure_model`` may not)."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.is_meta or isinstance(p, torch.nn.UninitializedParameter) for p in parameters)
