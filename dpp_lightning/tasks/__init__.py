"""Tasks: a LightningModule and a LightningDataModule each. Libraries of a task load when one of its names is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpp_lightning.tasks.adamerging import AdaMergingModule, GLUEMixDataModule, TextMixDataModule
    from dpp_lightning.tasks.causal_lm import CausalLMModule, InstructionDataModule
    from dpp_lightning.tasks.common import LoRA
    from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
    from dpp_lightning.tasks.vision import DigitsDataModule, ImageDataModule, VisionModule

__all__ = [
    "AdaMergingModule",
    "CausalLMModule",
    "DigitsDataModule",
    "GLUEDataModule",
    "GLUEMixDataModule",
    "GLUEModule",
    "ImageDataModule",
    "InstructionDataModule",
    "LoRA",
    "TextMixDataModule",
    "VisionModule",
]

_PACKAGES = {
    **dict.fromkeys(("AdaMergingModule", "GLUEMixDataModule", "TextMixDataModule"), "adamerging"),
    **dict.fromkeys(("CausalLMModule", "InstructionDataModule"), "causal_lm"),
    "LoRA": "common",
    **dict.fromkeys(("GLUEDataModule", "GLUEModule"), "glue"),
    **dict.fromkeys(("DigitsDataModule", "ImageDataModule", "VisionModule"), "vision"),
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
