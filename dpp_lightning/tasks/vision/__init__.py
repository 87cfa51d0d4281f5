"""Fine-tuning an image classifier."""

from dpp_lightning.tasks.vision.digits import DigitsDataModule
from dpp_lightning.tasks.vision.images import ImageDataModule
from dpp_lightning.tasks.vision.module import VisionModule

__all__ = ["DigitsDataModule", "ImageDataModule", "VisionModule"]
