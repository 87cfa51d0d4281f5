"""Strategies of Lightning for deltas: FSDP2 over all devices; and those that cannot work."""

from datetime import timedelta

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

_CURE = "trainer.strategy ddp, or FSDP2Strategy (--config fsdp.yaml), which shards as ZeRO stage 3 does"


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state in shards over all devices of all nodes.

    Lightning's ``ModelParallelStrategy`` with ``data_parallel_size`` the number of all devices, which that one wants to
    be told. A module shares its model out in ``configure_model``, as the tasks do
    (:func:`dpp_lightning.tasks.common.sharding.shard_for_strategy`).

    Args:
        save_distributed_checkpoint: checkpoints are folders of shards, written by all ranks; by default one file, which
            any strategy and number of devices resumes from.
        process_group_backend: such as ``nccl`` or ``gloo``; by default what fits the device.
        timeout: how long a rank waits for the others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Settle the size of the mesh, now that the number of devices is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def refuse_flat(trainer: Trainer, what: str) -> None:
    """Refuse strategies that hand an optimizer flat padded pieces of many parameters together: which entry is whose is
    lost, and with it theta_0 of a parameter and the mean over entries.

    Args:
        trainer: whose strategy it is.
        what: needs the parameters as they are.

    Raises:
        ValueError: DeepSpeed, or FSDP1 with ``use_orig_params=False``; with the strategies that work.
    """
    strategy = trainer.strategy
    flat = isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True)
    if flat or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{what} needs the parameters as they are, but {type(strategy).__name__}"
            f"{'(use_orig_params=False)' if flat else ''} keeps them in flat padded pieces: take {_CURE}"
        )


def refuse_fsdp1(trainer: Trainer, what: str) -> None:
    """Refuse FSDP1, which leaves a rank flat parts of parameters that nothing tells the places of.

    Args:
        trainer: whose strategy it is.
        what: needs to know the places.

    Raises:
        ValueError: as said, with the strategies that work.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            f"{what} needs to know the places of a parameter's entries, but {type(trainer.strategy).__name__} (FSDP1) "
            f"flattens its parts: take {_CURE}"
        )


def refuse_one_memory(trainer: Trainer) -> None:
    """Refuse ranks that a fork server starts on the CPU: Lightning hands them the weights in memory that they share, so
    each step of a rank is a step of all, and what one rank prunes another trains (seen with Lightning 2.6).

    Args:
        trainer: whose strategy it is.

    Raises:
        ValueError: as said, with the strategies that work.
    """
    strategy = trainer.strategy
    method = getattr(strategy, "_start_method", None)
    if method == "forkserver" and trainer.world_size > 1 and strategy.root_device.type == "cpu":
        raise ValueError(
            f"{type(strategy).__name__}(start_method='forkserver') lets all ranks on a CPU train the same memory: take "
            "start_method spawn (strategy ddp_spawn) or fork (ddp_fork), or trainer.strategy ddp"
        )
