"""Sharding a task's model by its transformer blocks, for ``ModelParallelStrategy`` (FSDP2)."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from dpp_lightning.tensors.blocks import block_of


def shard_for_strategy(module: pl.LightningModule, model: nn.Module) -> None:
    """Share a module's model out over the ranks, block by block; nothing where the strategy does not shard.

    To be called in ``configure_model``; a second call does nothing. Weights are loaded on the CPU before, and only a
    block at a time goes to a device whole.

    Args:
        module: attached to its trainer, if there is one.
        model: of the module, with its weights.

    Raises:
        ValueError: tensor parallelism is asked for.
    """
    trainer = module._trainer  # the property raises where a module is loaded from a checkpoint, without a trainer
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or isinstance(model, FSDPModule):
        return
    assert module.device_mesh is not None
    parallel = module.device_mesh["tensor_parallel"].size()
    if parallel > 1:
        raise ValueError(
            f"tensor_parallel_size is {parallel}, but the tasks shard over data_parallel alone: set it to 1"
        )
    mesh = module.device_mesh["data_parallel"]
    for name, part in model.named_modules():
        if block_of(f"{name}.") == f"{name}.":
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
