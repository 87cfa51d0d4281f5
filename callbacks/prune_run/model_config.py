"""``config.json`` of the model in a module, for the folders of its deltas."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from dpp_lightning.storage.model_configuration import CONFIG


def model_config_file(module: nn.Module) -> dict[str, bytes]:
    """``config.json`` of the outermost model of transformers or timm in a module; empty without one.

    With it ``dpp apply`` writes a dense folder that ``from_pretrained`` or ``timm.create_model`` loads. It says what
    the model is now, and not where it was loaded from, which may be a path of this machine.
    """
    for child in module.modules():
        # a PeftModel passes its model's attributes on, so its class is asked whether it is a transformers model
        if hasattr(type(child), "base_model_prefix") and hasattr(getattr(child, "config", None), "to_json_string"):
            return _of_transformers(child)
        if type(child).__module__.startswith("timm.") and hasattr(child, "pretrained_cfg"):
            whole = len([*child.parameters()]) == len([*module.parameters()])  # no backbone of a larger model
            return _of_timm(child) if whole else {}
    return {}


def _of_transformers(model: Any) -> dict[str, bytes]:
    config = deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return {CONFIG: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()}


def _of_timm(model: Any) -> dict[str, bytes]:
    """As timm saves it; empty where it would build another model: a head put in by hand, or a layer's class given."""
    from timm.models._hub import save_config_for_hf  # the public save_for_hf writes the weights too

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        try:
            labels = getattr(model.get_classifier(), "out_features", model.num_classes)
            save_config_for_hf(model, str(path))
        except (AttributeError, KeyError, ValueError):
            return {}
        return {CONFIG: path.read_bytes()} if labels == model.num_classes else {}
