"""Sharding a task's model by its transformer blocks, for ``ModelParallelStrategy`` (FSDP2)."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from dpp_lightning.tensors.blocks import block_of


def shard_for_strategy(module: pl.LightningModule, model: nn.Module) -> None:
    """Shard a module's model over the ranks, block by block; does nothing where the strategy does not shard.

    To be called in ``configure_model``; a second call does nothing. The weights are loaded on the CPU before, and only
    one block at a time is on a device whole.

    Args:
        module: a task's module, with or without a trainer.
        model: the model in it, with its weights.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    trainer = module._trainer  # ``module.trainer`` raises where a module is loaded from a checkpoint, without a trainer
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or isinstance(model, FSDPModule):
        return
    assert module.device_mesh is not None
    parallel = module.device_mesh["tensor_parallel"].size()
    if parallel > 1:
        raise ValueError(
            f"tensor_parallel_size is {parallel}, but the tasks shard over data_parallel alone: set it to 1"
        )
    mesh = module.device_mesh["data_parallel"]
    for block in block_modules(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def block_modules(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, such as a transformer's layers; of stages that hold blocks these, not the stages."""
    names = [
        f"{name}."
        for name, module in model.named_modules()
        if block_of(f"{name}.") == f"{name}." and any(module.children()) and not isinstance(module, nn.ModuleList)
    ]
    inner = [name for name in names if not any(other != name and other.startswith(name) for other in names)]
    return [model.get_submodule(name.removesuffix(".")) for name in inner]
