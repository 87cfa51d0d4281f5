"""ModelCheckpoint's best weights in a module, for as long as they are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    """Inside the block the module holds ModelCheckpoint's best weights; then its own again, bit for bit.

    Optimizers are left alone. All ranks must call.

    Args:
        trainer: at the end of a fit.
        module: its parameters whole, or (by now) in shards of FSDP2.
        keep: what the block leaves in the module stays.

    Raises:
        ValueError: no ModelCheckpoint kept one, or it is of another model.
        FileNotFoundError: not every rank sees it.
    """
    last = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in module.state_dict().items()}
    kept = False
    try:
        _load_best(trainer, module)
        yield
        kept = keep
    finally:
        if not kept:
            reshard(module)
            module.load_state_dict(last)


def _load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    path = trainer.strategy.broadcast(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    if not path:
        raise ValueError("ckpt='best' needs a ModelCheckpoint(monitor=...) that kept a best checkpoint; found none")
    trainer.strategy.barrier("best checkpoint")  # the first rank, or each of them, has written it
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
    """Put a checkpoint's weights into a module, each rank its own part, with one tensor at a time whole.

    Args:
        module: any tensor of it whole or in shards.
        path: one file, or a folder of shards.

    Raises:
        ValueError: names or shapes that are not the module's, or a damaged checkpoint.
    """
    stored = read_sharded(path) if is_sharded(path) else {n: StoredTensor.of(t) for n, t in load_tensors(path).items()}
    found = {without_wrappers(name): tensor for name, tensor in stored.items()}
    own = {without_wrappers(name): t for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    _check_fits(path, found, own)
    for name, tensor in own.items():
        tensor.copy_(shard_like(found[name].whole().to(tensor.dtype), tensor))


def _check_fits(path: Path, found: Mapping[str, StoredTensor], own: Mapping[str, Any]) -> None:
    faults = [f"{name} is missing" for name in own if name not in found]
    faults += [f"{name} is not of this model" for name in found if name not in own]
    faults += [
        f"{name} is {found[name].shape}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in found and found[name].shape != tuple(tensor.shape)
    ]
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(
            f"{path} does not hold the weights of this model: {'; '.join(faults[:10])}{more}; give ModelCheckpoint a "
            "folder of its own, or take ckpt='last'"
        )
