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
        if hasattr(part, "save_pretrained") and hasattr(config, "to_json_string"):
            own: Any = deepcopy(config)
            own.architectures = [type(part).__name__]
            return {"config.json": own.to_json_string(use_diff=False).encode()}
    return {}
