"""ModelCheckpoint's best weights in a module, for as long as they are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.sharded_checkpoint import is_sharded, read_sharded
from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.names import without_wrappers
from dpp_lightning.tensors.shards import is_dtensor, reshard, shard_like


@contextmanager
def best_weights(trainer: pl.Trainer, module: pl.LightningModule, *, keep: bool) -> Iterator[None]:
    """Inside the block the module holds ModelCheckpoint's best weights, afterwards its own again, bit for bit.

    The optimizers' state stays as it is. All ranks must call.

    Args:
        trainer: at the end of a fit.
        module: its parameters are whole, or in shards of FSDP2.
        keep: after the block the module keeps the weights that the block leaves in it.

    Raises:
        ValueError: if no ModelCheckpoint kept a best checkpoint, or it is one of another model.
        FileNotFoundError: if the parameters are in shards and a rank cannot see the checkpoint.
    """
    last = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()}
    restore = True
    try:
        _load_best(trainer, module)
        yield
        restore = not keep
    finally:
        if restore:
            reshard(module)
            module.load_state_dict(last)


def _load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    path = trainer.strategy.broadcast(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if not path:
        raise ValueError("ckpt='best' needs a ModelCheckpoint(monitor=...) that kept a best checkpoint; found none")
    trainer.strategy.barrier("best checkpoint")  # rank 0, or with sharded checkpoints every rank, has written it
    if not any(is_dtensor(p) for p in module.parameters()):
        module.load_state_dict(trainer.strategy.load_checkpoint(path)["state_dict"])
        return
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: rank {trainer.global_rank} does not see the best checkpoint; ckpt='best' under FSDP2 reads it on "
            "all ranks: set ModelCheckpoint(dirpath=...) to a folder that all nodes share, or take ckpt='last'"
        )
    load_into_shards(module, Path(path))


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
