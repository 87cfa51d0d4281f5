"""Lightning's strategies and deltas: FSDP2 over all devices, and refusals of the strategies that cannot work."""

from datetime import timedelta

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout

_CURE = "trainer.strategy ddp, or FSDP2Strategy (--config fsdp.yaml), which shards as ZeRO stage 3 does"


class FSDP2Strategy(ModelParallelStrategy):
    """Shard parameters, gradients and optimizer state over all devices of all nodes (FSDP2).

    This is Lightning's ``ModelParallelStrategy`` with ``data_parallel_size`` set to the number of all devices. A module
    shards its model in ``configure_model``, as the tasks do with
    :func:`dpp_lightning.tasks.common.sharding.shard_for_strategy`.

    Args:
        save_distributed_checkpoint: write each checkpoint as a folder of shards, by all ranks. By default it is one
            file, from which any strategy and number of devices can resume.
        process_group_backend: ``nccl`` or ``gloo``; by default the one that suits the device.
        timeout: how long a rank waits for the others in a collective.
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
        """Set the size of the device mesh, now that the number of devices is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def refuse_flat_parameters(trainer: Trainer, component: str) -> None:
    """Refuse strategies whose optimizer gets flat, padded pieces of many parameters together.

    Which entry belongs to which parameter is lost there, and with it theta_0 of a parameter and the mean over its
    entries.

    Args:
        trainer: the trainer with the strategy.
        component: what needs whole parameters, such as ``"AdamR"``; for the message.

    Raises:
        ValueError: if the strategy is DeepSpeed, or FSDP1 with ``use_orig_params=False``. The message names the
            strategies that work.
    """
    strategy = trainer.strategy
    flat_fsdp1 = isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True)
    if flat_fsdp1 or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{component} needs the parameters as they are, but {type(strategy).__name__}"
            f"{'(use_orig_params=False)' if flat_fsdp1 else ''} keeps them in flat padded pieces: take {_CURE}"
        )


def refuse_fsdp1(trainer: Trainer, component: str) -> None:
    """Refuse FSDP1, whose ranks hold flat pieces of parameters without the positions of their entries.

    Args:
        trainer: the trainer with the strategy.
        component: what needs the positions; for the message.

    Raises:
        ValueError: if the strategy is FSDP1. The message names the strategies that work.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            f"{component} needs the positions of a parameter's entries, but {type(trainer.strategy).__name__} (FSDP1) "
            f"flattens a rank's piece of it: take {_CURE}"
        )


def refuse_shared_memory(trainer: Trainer) -> None:
    """Refuse ranks on a CPU that a fork server starts.

    Lightning 2.6 hands them the weights in memory that they share, so that an optimizer step of one rank is a step of
    all, and what one rank prunes another rank trains.

    Args:
        trainer: the trainer with the strategy.

    Raises:
        ValueError: if the strategy starts several ranks on a CPU by a fork server. The message names the start methods
            and strategies that work.
    """
    strategy = trainer.strategy
    start_method = getattr(strategy, "_start_method", None)
    if start_method == "forkserver" and trainer.world_size > 1 and strategy.root_device.type == "cpu":
        raise ValueError(
            f"{type(strategy).__name__}(start_method='forkserver') lets all ranks on a CPU train the same memory: take "
            "start_method spawn (strategy ddp_spawn) or fork (ddp_fork), or trainer.strategy ddp"
        )
