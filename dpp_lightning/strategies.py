"""Strategies of Lightning for deltas: FSDP2 over all devices; and the one that cannot work."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state in shards over all devices of all nodes.

    Lightning's ``ModelParallelStrategy`` with ``data_parallel_size`` the number of all devices, which that one wants to
    be told. A module shares its model out in ``configure_model``, as the tasks do
    (:func:`dpp_lightning.tasks.sharding.shard_for_strategy`).

    Args:
        save_distributed_checkpoint: checkpoints are folders of shards, written by all ranks; by default one file, which
            any strategy and number of devices resumes from.
        process_group_backend: such as ``nccl`` or ``gloo``; by default what fits the device.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Settle the size of the mesh, now that the number of devices is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def refuse_deepspeed(trainer: Trainer, what: str) -> None:
    """Refuse DeepSpeed, which hands an optimizer flat padded pieces of all parameters together: which entry is whose is
    lost, and with it theta_0 of a parameter and the mean over entries.

    Args:
        trainer: whose strategy it is.
        what: needs the parameters as they are.

    Raises:
        ValueError: as said, with the strategies that work.
    """
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{what} needs the parameters as they are, but DeepSpeedStrategy keeps them in flat padded pieces: take "
            "trainer.strategy ddp, or FSDP2Strategy (--config fsdp.yaml), which shards as ZeRO stage 3 does"
        )
