"""Both models of a run while they have changed places: the module holds the base's weights, the base the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.name_matching import saved_names
from dpp_lightning.tensors.names import has_file_names, named_tensors


def exchanged_plan(
    module: nn.Module,
    base: BaseWeights,
    replaced: Sequence[str],
    scope: Scope,
    base_name: str | None = None,
    base_revision: str | None = None,
) -> PruningPlan:
    """The plan inside ``base.exchanged(module, replaced)``.

    Args:
        module: holds theta_0 of the replaced tensors.
        base: holds the fine-tuned values of these.
        replaced: canonical names.
        scope: what is pruned.
        base_name, base_revision: for the file.

    Raises:
        ValueError: see :meth:`dpp_lightning.pruning.plan.PruningPlan.matched`.
    """
    named, in_base = named_tensors(module), base.tensors
    in_module = {n.name: n.tensor for n in named}
    return PruningPlan.matched(
        {**in_base, **{name: in_module[name] for name in replaced}},
        {**in_module, **{name: in_base[name] for name in replaced}},
        scope,
        named,
        base_name=base_name,
        base_revision=base_revision,
        saved=saved_names(named, base.saved, exact=has_file_names(module)),
    )


@torch.no_grad()
def leave_pruned(module: nn.Module, base: BaseWeights, replaced: Sequence[str], delta: SparseDelta) -> None:
    """Put base plus delta into a module that holds the fine-tuned weights, after the exchange.

    If it is interrupted the module holds the base's replaced tensors, or all of base plus delta.

    Args:
        module: to be written.
        base: holds theta_0 again.
        replaced: canonical names of the tensors that the delta does not carry.
        delta: drawn from both.
    """
    named = {n.name: n for n in named_tensors(module)}

    def take_base() -> None:
        if delta.is_applied:
            return
        for name in replaced:
            tensor = named[name].tensor.detach()
            tensor.copy_(base.tensors[name])
            named[name].store(tensor)

    with restored_after(take_base):
        take_base()
        delta.apply_(module, force=True)


def can_be_pruned(base: BaseWeights, module: nn.Module, scope: Scope, callback: str) -> bool:
    """Whether all weights are finite, so that there are deltas; a warning says what stands against them or makes them
    empty, since a fit ends well however its training went.

    Args:
        base: theta_0.
        module: holds the fine-tuned weights.
        scope: what is pruned.
        callback: name of the callback's class, for the warning.
    """
    named = named_tensors(module)
    checks = PruningPlan.matched(base.tensors, {n.name: n.tensor for n in named}, scope, named).checks
    if fault := checks.not_finite():
        rank_zero_warn(f"{callback} did not prune: {fault}")
        return False
    if reason := checks.nothing_changed():
        rank_zero_warn(f"{reason}: every delta is empty. Did the training take a step, and train what is in scope?")
    return True
