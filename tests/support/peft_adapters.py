"""A model as if it had been fine-tuned, and a base with the LoRA adapter that was exported for it."""

import copy
import warnings

import torch
from peft import PeftModel


def moved(model, seed=1, scale=0.05):
    """The model as if it had been fine-tuned."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def loaded(base, folder):
    """peft's model on a copy of the base, loaded without a complaint about keys."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|unexpected).*")
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
