"""Fine-tuning an encoder on a task of GLUE."""

from dpp_lightning.tasks.glue.data import GLUEDataModule
from dpp_lightning.tasks.glue.module import GLUEModule

__all__ = ["GLUEDataModule", "GLUEModule"]
