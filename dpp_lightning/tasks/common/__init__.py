"""What all tasks share: base classes of their modules and data modules, optimizers, LoRA, sharding, exact resume."""

from dpp_lightning.tasks.common.data import TaskDataModule
from dpp_lightning.tasks.common.lora import LoRA
from dpp_lightning.tasks.common.module import FineTuningModule, ScoredModule

__all__ = ["FineTuningModule", "LoRA", "ScoredModule", "TaskDataModule"]
