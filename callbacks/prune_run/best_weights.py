"""ModelCheckpoint's best weights in a module, for as long as they are pruned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.sharded_checkpoint import is_sharded, read_sharded
from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.names import without_wrappers
from dpp_lightning.tensors.shards import is_dtensor, reshard, shard_like


@contextmanager
def best_weights(trainer: pl.Trainer, module: pl.LightningModule, *, keep: bool) -> Iterator[None]:
    """Inside the block the module holds ModelCheckpoint's best weights, afterwards its own again, bit for bit.

    They are those that Lightning loads from the checkpoint: the module's ``on_load_checkpoint`` sees it first, names
    may be missing under ``strict_loading=False``, and beside ``WeightAveraging`` they are the averaged ones, which
    were scored. The optimizers' state and that of callbacks stay as they are. All ranks must call.

    Args:
        trainer: at the end of a fit.
        module: its parameters are whole, or in shards of FSDP2.
        keep: after the block the module keeps the weights that the block leaves in it.

    Raises:
        ValueError: if no ModelCheckpoint kept a best checkpoint, or it is one of another model.
        FileNotFoundError: if the parameters are in shards and a rank cannot see the checkpoint.
    """
    last = _Values(module)
    with restored_after(last.put_back):
        _load_best(trainer, module)
        yield
        if keep:
            last.forget()


def best_checkpoints(trainer: pl.Trainer) -> ModelCheckpoint:
    """The callback whose best checkpoint is meant: the first ModelCheckpoint that keeps checkpoints by a metric.

    Raises:
        ValueError: if there is none.
    """
    all_of_them = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    keeping = _keeping_best(all_of_them)
    if keeping:
        return keeping[0]
    seen = [f"ModelCheckpoint(monitor={c.monitor!r}, save_top_k={c.save_top_k})" for c in all_of_them]
    raise ValueError(
        "ckpt='best' needs a ModelCheckpoint(monitor=...) with save_top_k of at least 1 among the callbacks; found "
        f"{', '.join(seen) or 'none'}. Give one, or take ckpt='last'"
    )


def warn_of_several(trainer: pl.Trainer) -> None:
    """Warn if several ModelCheckpoints keep checkpoints by a metric, with the one that is taken."""
    keeping = _keeping_best(trainer.checkpoint_callbacks)
    if len(keeping) > 1:
        rank_zero_warn(
            f"ckpt='best' takes the best {keeping[0].monitor} of the first of {len(keeping)} ModelCheckpoints; the "
            f"others monitor {', '.join(str(c.monitor) for c in keeping[1:])}"
        )


def _keeping_best(callbacks: Iterable[pl.Callback]) -> list[ModelCheckpoint]:
    found = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
    return [c for c in found if c.monitor is not None and c.save_top_k != 0]


def check_loads(module: pl.LightningModule) -> None:
    """Refuse a module whose checkpoints do not load, since they lack parameters.

    Raises:
        ValueError: if ``state_dict()`` leaves out parameters, loading is strict, and nothing fills them in.
    """
    if any(is_overridden(hook, module) for hook in ("on_load_checkpoint", "load_state_dict")):
        return  # which may fill them in
    parameters = dict(module.named_parameters(remove_duplicate=False))
    saved = module.state_dict() if module.strict_loading else parameters
    if missing := sorted(set(parameters) - set(saved)):
        raise ValueError(
            f"ckpt='best': {type(module).__name__}.state_dict() leaves out {len(missing)} of {len(parameters)} "
            f"parameters ({', '.join(missing[:3])}), so that its checkpoints do not load; set its strict_loading=False"
        )


def kept_none(trainer: pl.Trainer) -> str | None:
    """Why there is no best checkpoint at the end of a fit, with the cure; None if there is one. All ranks must call."""
    checkpoints = best_checkpoints(trainer)
    if trainer.strategy.broadcast(checkpoints.best_model_path):
        return None
    return (
        f"ckpt='best', and ModelCheckpoint(monitor={checkpoints.monitor!r}) kept no checkpoint in "
        f"{trainer.global_step} steps; let it save more often, or take ckpt='last'"
    )


class _Values:
    """The tensors of a module, and the extra state of its submodules, to be put back whatever was loaded over them."""

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module  # None when nothing is to be put back
        self._copies: dict[int, Tensor] = {}
        self._held: list[tuple[dict[str, Any], str, Tensor]] = []
        self._extra: list[tuple[nn.Module, Any]] = []
        for child in module.modules():
            for tensors in (child._parameters, child._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        self._held.append((cast(dict[str, Any], tensors), name, tensor))
                        if id(tensor) not in self._copies:
                            self._copies[id(tensor)] = tensor.detach().clone()
            if type(child).get_extra_state is not nn.Module.get_extra_state:
                self._extra.append((child, deepcopy(child.get_extra_state())))

    def forget(self) -> None:
        """Put nothing back."""
        self._module = None

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was; a second call does what an interrupt kept the first from, or nothing."""
        if self._module is None:
            return
        reshard(self._module)
        for tensors, name, tensor in self._held:
            tensors[name] = tensor
            tensor.copy_(self._copies[id(tensor)])
        for child, state in self._extra:
            child.set_extra_state(state)
        self.forget()


def _load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    if reason := kept_none(trainer):
        raise ValueError(reason)
    _await_writing(trainer.strategy.checkpoint_io)
    path = trainer.strategy.broadcast(best_checkpoints(trainer).best_model_path)
    trainer.strategy.barrier("best checkpoint")  # rank 0, or with sharded checkpoints every rank, has written it
    if not any(is_dtensor(p) for p in module.parameters()):
        # this fit wrote the file, so what it pickled, such as hyperparameters of any class, may be read
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        return
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: rank {trainer.global_rank} does not see the best checkpoint; ckpt='best' under FSDP2 reads it on "
            "all ranks: set ModelCheckpoint(dirpath=...) to a folder that all nodes share, or take ckpt='last'"
        )
    load_into_shards(module, Path(path))


def _await_writing(io: Any) -> None:
    """Wait for the thread that writes checkpoints, where one does."""
    executor = getattr(io, "_executor", None) if isinstance(io, AsyncCheckpointIO) else None
    if executor is not None:
        executor.submit(lambda: None).result()


@torch.no_grad()
def load_into_shards(module: pl.LightningModule, path: Path) -> None:
    """Load a checkpoint into a module whose tensors may be in shards; one tensor at a time is whole in memory.

    Args:
        module: each of its tensors is whole, or in shards of which every rank loads its own.
        path: a checkpoint in one file, or the folder of a sharded checkpoint.

    Raises:
        ValueError: if names or shapes are not the module's, or the checkpoint is damaged.
    """
    tensors = read_sharded(path) if is_sharded(path) else {n: StoredTensor.of(t) for n, t in load_tensors(path).items()}
    stored = {without_wrappers(name): tensor for name, tensor in tensors.items()}
    wanted = {without_wrappers(name): t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    _check_fits(path, stored, wanted)
    for name, tensor in wanted.items():
        tensor.copy_(shard_like(stored[name].whole().to(tensor.dtype), tensor))


def _check_fits(path: Path, stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [f"{name} is not of this model" for name in stored if name not in wanted]
    faults += [
        f"{name} is {stored[name].shape}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(
            f"{path} does not hold the weights of this model: {'; '.join(faults[:10])}{more}; give ModelCheckpoint a "
            "folder of its own, or take ckpt='last'"
        )
