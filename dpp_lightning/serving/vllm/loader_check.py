"""Whether vLLM's weights can be overwritten in place, found out before anything is written.

vLLM's sparse patches are right only where the model's loader ends in one plain copy of each value, and where the engine
computes with the very tensors that were loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpp_lightning.storage.locate import few_names

_FORMATS = ("auto", "hf", "safetensors", "pt", "fastsafetensors", "instanttensor", "runai_streamer")


def check_engine(vllm_config: Any, model: nn.Module) -> None:
    """Refuse an engine that does not compute with the base's tensors as its files hold them.

    Args:
        vllm_config: vLLM's own.
        model: the worker's model.

    Raises:
        ValueError: quantised weights, weights that are not of the model's files, or weights that vLLM transforms after
            loading, with the reason.
    """
    config, load_format = vllm_config.model_config, vllm_config.load_config.load_format
    reasons = {
        f"its weights are quantised ({config.quantization})": config.quantization is not None,
        f"load_format {load_format!r} does not load the model's own files": load_format not in _FORMATS,
        "vLLM keeps products of weights for multi-head latent attention": config.use_mla,
        "vLLM may reorder the weights of experts": config.is_moe,
        "vLLM's CPU engine packs weights and computes with the packed copies": _packed(model),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"deltas cannot be switched in this server: {'; '.join(found)}. Serve dense models instead")


def check_loader(model: nn.Module, tensors: Mapping[str, Tensor], *, all_layers: bool = True) -> None:
    """Ask the model's loader where it would copy tensors of the checkpoint, without letting it.

    A tensor that the loader leaves out, as it would of a dense model, is warned of.

    Args:
        model: the worker's model, with the values of ``tensors`` in it.
        tensors: name in the checkpoint to tensor of the base.
        all_layers: this worker has all of the model's layers, so that each tensor should find a place.

    Raises:
        ValueError: a tensor that the model lacks, or that its loader does more with than copying it.
    """
    left_out = []
    for name, tensor in tensors.items():
        try:
            places = _destinations(model, name, tensor)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{type(model).__name__} of vLLM does not take {name} ({reason})") from error
        if len(set(places)) < len(places):
            raise ValueError(f"{name}: vLLM computes with other values than it loads, so it cannot be switched")
        if not places:
            left_out.append(name)
    if left_out and all_layers:
        warnings.warn(f"vLLM loads no {few_names(left_out)}, so the delta's values are left out", stacklevel=2)


@torch.no_grad()
def _destinations(model: Any, name: str, tensor: Tensor) -> list[int]:
    """Addresses to which the loader would copy (parts of) a tensor."""
    found: list[int] = []

    def note(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if destination.shape != source.shape:
            raise ValueError(f"a place of shape {tuple(destination.shape)} for {tuple(source.shape)}")
        found.append(destination.data_ptr())
        return destination

    copy = Tensor.copy_
    Tensor.copy_ = note  # type: ignore[assignment, method-assign]
    try:
        model.load_weights([(name, tensor)])
    finally:
        Tensor.copy_ = copy  # type: ignore[method-assign]
    return found


def _packed(model: nn.Module) -> bool:
    products = (getattr(module, "cpu_linear", None) for module in model.modules())
    return any(product is not None and product is not nn.functional.linear for product in products)
