"""Fine-tuning a decoder on questions with worked answers."""

from dpp_lightning.tasks.causal_lm.data import InstructionDataModule
from dpp_lightning.tasks.causal_lm.module import CausalLMModule

__all__ = ["CausalLMModule", "InstructionDataModule"]
