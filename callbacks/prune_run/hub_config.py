"""The configuration of a transformers model inside a LightningModule."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn


def hub_config(module: nn.Module) -> dict[str, bytes]:
    """``config.json`` of the outermost transformers model in a module, for the delta's folder.

    With it ``dpp apply`` writes a dense folder that ``from_pretrained`` loads. Empty where there is no such model.
    """
    for part in module.modules():
        config = getattr(part, "config", None)
        # a PeftModel passes its model's attributes on; asked by class, it is not the model
        if hasattr(type(part), "base_model_prefix") and hasattr(config, "to_json_string"):
            own: Any = deepcopy(config)
            own.architectures = [type(part).__name__]
            return {"config.json": own.to_json_string(use_diff=False).encode()}
    return {}
