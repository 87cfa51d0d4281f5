"""Folders of timm's vision models, loaded and called as those of transformers are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.file_content import read_json
from dpp_lightning.storage.locate import local_folder
from dpp_lightning.storage.model_configuration import CONFIG


@dataclass
class TimmConfig:
    """What calibration asks of a configuration, for a model of images."""

    pad_token_id: int | None = None
    is_encoder_decoder: bool = False
    max_position_embeddings: int | None = None

    def get_text_config(self) -> TimmConfig:
        """Itself, as there is no other."""
        return self


class TimmModel(nn.Module):
    """A model of timm that takes ``pixel_values`` and returns ``logits``."""

    main_input_name = "pixel_values"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, TimmConfig()

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Images, shape (samples, channels, height, width), to logits, shape (samples, classes)."""
        return {"logits": self.model(pixel_values)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls, source: str, *, revision: str | None = None, output_loading_info: bool = True
    ) -> tuple[TimmModel, dict[str, list[str]]]:
        """The model of a folder or hub id, and the names of weights that its files lack.

        Args:
            source, revision: folder or hub id, with timm's ``config.json``.
            output_loading_info: must be true; here so that it is called as models of transformers are.

        Raises:
            ValueError: an architecture that this timm does not have, or weights of other shapes.
        """
        import timm

        assert output_loading_info
        config = read_timm_config(source, revision)
        arguments = {**config.get("model_args", {})}
        if "num_classes" in config:
            arguments["num_classes"] = config["num_classes"]
        try:
            model = timm.create_model(config["architecture"], pretrained=False, **arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"timm has no such model: {error}") from error
        tensors = dict(load_tensors(source, revision))
        result = model.load_state_dict(
            {n: t.to(model.state_dict()[n]) for n, t in tensors.items() if n in model.state_dict()}, strict=False
        )
        return cls(model), {"missing_keys": list(result.missing_keys)}


def is_timm(source: str, revision: str | None) -> bool:
    """Whether a folder's ``config.json`` is one of timm."""
    config = read_timm_config(source, revision)
    return "architecture" in config and "model_type" not in config


def read_timm_config(source: str, revision: str | None) -> dict[str, Any]:
    """A folder's ``config.json``; empty where it is not to be read."""
    try:
        config = read_json(local_folder(source, revision, [CONFIG]) / Path(CONFIG))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
