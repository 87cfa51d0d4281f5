"""Which weights are the base in a Hugging Face ``Trainer``, and what its checkpoints tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerState

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.tensors.names import canonical_tensors, check_prunable, owners

_STATE_KEY = "dpp_base"  # in trainer_state.json, beside the states of callbacks


def settle_base(
    model: nn.Module,
    settings: PruneSettings,
    state: TrainerState,
    optimizers: Sequence[Optimizer],
    kept: BaseWeights | None,
    *,
    goes_on: bool,
) -> BaseWeights:
    """The base of a training that begins.

    It comes from ``pretrained``, else from the model. A training that resumes from a checkpoint has put that one's
    weights into the model by now: its base is what the model held before, if the checkpoint knows its fingerprint,
    which :func:`check_base` compares; else what an AdamR holds in its state.

    Args:
        model: of the trainer.
        settings: of the callback.
        state: of the trainer; of the checkpoint where training resumes.
        optimizers: of the trainer, with the checkpoint's state where training resumes.
        kept: what the model held when the callback was attached, or when a training began that did not end.
        goes_on: ``kept`` is of a training of this model that was cut short and begins anew.

    Raises:
        ValueError: if weights cannot be pruned, or nothing tells the base of a training that resumes.
        FileNotFoundError: if there is no checkpoint ``pretrained``.
    """
    resumes = state.global_step > 0
    check_prunable(canonical_tensors(model))
    if settings.pretrained is not None:
        base = BaseWeights.from_checkpoint(model, settings.pretrained, settings.revision, settings.scope)
    elif goes_on and kept is not None and not resumes:
        base = kept
    elif not resumes:
        base = BaseWeights.from_module(model)
    else:
        base = kept if kept is not None and _remembered(state, settings, explicit=False) else _frozen(model)
    base.adopt_optimizer_copies(model, optimizers, verified=_remembered(state, settings, explicit=False) is not None)
    like = canonical_tensors(model)
    base.tensors = {name: tensor.to(like[name].device) for name, tensor in base.tensors.items() if name in like}
    return base


def check_base(
    base: BaseWeights, model: nn.Module, new: set[str], settings: PruneSettings, state: TrainerState
) -> None:
    """Refuse a base that is not the one a resumed training began from; note its fingerprint for the checkpoints.

    Args:
        base: as it is pruned, with a LoRA adapter's own base.
        model: of the trainer.
        new: canonical names of the parameters that were new in this training.
        settings: of the callback.
        state: of the trainer, which its checkpoints hold.

    Raises:
        ValueError: if the base is unknown or another one.
    """
    trained = {name for name, owner in owners(model).items() if owner.requires_grad}
    if not base.explicit and trained - new - set(base.tensors):
        raise ValueError(
            f"training resumes at step {state.global_step}, and neither its checkpoint nor its optimizer tells the "
            f"base: pass {settings.callback}(pretrained=<folder or hub id of the base>)"
        )
    now = base.fingerprint(model, new, settings.scope.carry)
    began = _remembered(state, settings, explicit=base.explicit)
    if began is not None and began != now:
        raise ValueError(
            f"the base now seen (fingerprint {now}) is not the one that the checkpoint's training began from "
            f"({began}): build the model from the original base, with the same seed for a new head or carry= with its "
            "names, or pass pretrained="
        )
    callbacks: Any = state.stateful_callbacks
    of_scope = callbacks.setdefault(_STATE_KEY, {}).setdefault(repr(settings.scope.carry), {})
    of_scope[_kind(base.explicit)] = now


def _remembered(state: TrainerState, settings: PruneSettings, *, explicit: bool) -> str | None:
    """Fingerprint of the base that a checkpoint's training began from; None where it was not noted for such a base."""
    callbacks: Any = state.stateful_callbacks or {}
    fingerprint: str | None = callbacks.get(_STATE_KEY, {}).get(repr(settings.scope.carry), {}).get(_kind(explicit))
    return fingerprint


def _kind(explicit: bool) -> str:
    """A checkpoint that the user names may lack tensors which a model holds, so the two kinds are not compared."""
    return "pretrained" if explicit else "model"


def _frozen(model: nn.Module) -> BaseWeights:
    """What is known of a base when a checkpoint's weights are in the model: that which is not trained."""
    trained = {name for name, owner in owners(model).items() if owner.requires_grad}
    tensors = {name: tensor for name, tensor in canonical_tensors(model).items() if name not in trained}
    return BaseWeights({name: tensor.detach().clone() for name, tensor in tensors.items()}, explicit=False)
