"""Adapters of peft that are not merged: parts of a fine-tuned model that its weights alone do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from dpp_lightning.tensors.names import TensorSource

_OF_ADAPTERS = re.compile(  # every kind of peft has base_layer; the others also stand in files without it
    r"(?:^|\.)(?:base_layer|original_module|modules_to_save|lora_[A-Z]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|"
    r"oft_[rR]|boft_[Rs]|hada_[wt]\d\w*|lokr_[wt]\d\w*|vera_lambda_[bd])(?=\.|$)"
)
_SHOWN = 3


def check_merged(finetuned: TensorSource, base: TensorSource, source: str = "the fine-tuned model") -> None:
    """Refuse a model with adapters as the fine-tuned form of one without, or the other way round.

    What such a layer computes is its own weight and what the adapter adds to it, so that the weights alone are not the
    model. Where both sides have adapters these are what is pruned, and a model may have such parts by itself. Only
    names are looked at.

    Args:
        finetuned, base: modules or state dicts.
        source: what a message calls the fine-tuned model.

    Raises:
        ValueError: in one line, with names of such tensors and the cure.
    """
    found = {source: _adapters(finetuned), "the base": _adapters(base)}
    with_adapters = [side for side, names in found.items() if names]
    if len(with_adapters) != 1:
        return
    (side,) = with_adapters
    names = found[side]
    more = ", …" if len(names) > _SHOWN else ""
    raise ValueError(
        f"{side} holds adapters that are not merged into its weights, {len(names)} tensors: "
        f"{', '.join(names[:_SHOWN])}{more}. Merge them first, by model.merge_and_unload() of peft; of a Lightning "
        "checkpoint with plain LoRA dpp export merges them (dpp export CHECKPOINT --base BASE writes the delta)"
    )


def _adapters(source: TensorSource) -> list[str]:
    names: Iterable[str] = (name for name, _ in source.named_parameters()) if isinstance(source, nn.Module) else source
    found = [name for name in names if _OF_ADAPTERS.search(name)]
    return sorted(found, key=lambda name: (".base_layer." in name, name))  # the adapter's own tensors first
