"""Fine-tuning an encoder on a GLUE task."""

from dpp_lightning.tasks.glue.data import GLUEDataModule
from dpp_lightning.tasks.glue.module import GLUEModule

__all__ = ["GLUEDataModule", "GLUEModule"]
