"""Whether a server of vLLM computes with the base's tensors as its files hold them."""

from __future__ import annotations

from typing import Any

from torch import nn

_FORMATS = ("auto", "hf", "safetensors", "pt", "fastsafetensors", "instanttensor", "runai_streamer")


def check_engine(vllm_config: Any, model: nn.Module) -> None:
    """Refuse an engine that does not.

    Args:
        vllm_config: vLLM's own.
        model: the worker's model, loaded.

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


def _packed(model: nn.Module) -> bool:
    products = (getattr(module, "cpu_linear", None) for module in model.modules())
    return any(product is not None and product is not nn.functional.linear for product in products)
