"""AdaMerging: training the weights of a merge."""

from dpp_lightning.tasks.adamerging.glue_mix import GLUEMixDataModule
from dpp_lightning.tasks.adamerging.module import AdaMergingModule
from dpp_lightning.tasks.adamerging.text_mix import TextMixDataModule

__all__ = ["AdaMergingModule", "GLUEMixDataModule", "TextMixDataModule"]
