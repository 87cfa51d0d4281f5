"""LoRA adapters (by peft) in a checkpoint, merged into the weights they adapt a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.export.lora_settings import MERGE_CURE, LoRASettings
from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.names import without_adapters, without_wrappers

_FACTOR = re.compile(r"(?P<layer>.*)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])\.(?P<adapter>[^.]+)(?:\.weight)?")
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)\.")
_PEFT_MODEL = re.compile(r"^(?:.*\.)?base_model\.model\.")  # before the names of the adapted model


@dataclass(frozen=True)
class Adapter:
    """W + scaling B A of one weight.

    Attributes:
        a, b: shapes (r, inputs) and (outputs, r).
        scaling: alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA.
        embedding: the weight lies as (inputs, outputs), one row a token.
    """

    a: StoredTensor
    b: StoredTensor
    scaling: float
    embedding: bool


def split_adapters(
    stored: Mapping[str, StoredTensor], hyper_parameters: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, Adapter]]:
    """Weights under the names of the model without adapters, and the adapters of some of them.

    A module that was trained whole beside adapters (``modules_to_save``) stands for the original.

    Args:
        stored: the checkpoint's names and tensors.
        hyper_parameters: of the checkpoint; ``lora`` has ``r`` and ``alpha``, and may have ``use_rslora``,
            ``rank_pattern`` and ``alpha_pattern`` as peft has them.

    Returns:
        Name, without the parts of wrappers and adapters, to tensor; name of the adapted weight to its adapter.

    Raises:
        ValueError: adapters of another kind than plain LoRA of linear and embedding layers, several of them, or
            adapters whose hyper-parameters :class:`LoRASettings` refuses.
    """
    plain: dict[str, StoredTensor] = {}
    modules: dict[str, str] = {}
    factors: dict[str, dict[str, StoredTensor]] = {}
    adapters, embeddings = set(), set()
    for name, tensor in stored.items():
        name = without_wrappers(name)
        if match := _FACTOR.fullmatch(name):
            weight = f"{without_adapters(match['layer'] + '.')}weight"
            factors.setdefault(weight, {})[match["factor"]] = tensor
            modules[weight] = _PEFT_MODEL.sub("", match["layer"])
            adapters.add(match["adapter"])
            if match["embedding"]:
                embeddings.add(weight)
        elif ".lora_" in name:
            raise ValueError(f"{name}: expected adapters of plain LoRA (without DoRA and bias); {MERGE_CURE}")
        elif whole := _SAVED.search(name):
            adapters.add(whole["adapter"])
            plain[without_adapters(name)] = tensor
        elif ".original_module." in name:
            plain.setdefault(without_adapters(name), tensor)
        else:
            plain[without_adapters(name)] = tensor
    if len(adapters) > 1:
        raise ValueError(f"the checkpoint holds the adapters {', '.join(sorted(adapters))}, expected one; {MERGE_CURE}")
    if not factors:
        return plain, {}
    settings = LoRASettings.read(hyper_parameters, next(iter(factors)))
    settings.check_patterns(modules.values())
    return plain, {w: _adapter(w, pair, settings, modules[w], w in embeddings) for w, pair in factors.items()}


def merged_blocks(weight: StoredTensor, adapter: Adapter, *, transposed: bool) -> Iterator[Tensor]:
    """Flat blocks of W + scaling B A, computed in float32 or better, in the weight's dtype.

    Args:
        weight: W.
        adapter: A, B and scaling.
        transposed: W lies as (inputs, outputs).

    Raises:
        ValueError: shapes that do not fit.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right = (t.whole().to(wide) for t in (adapter.b, adapter.a))
    if transposed or adapter.embedding:
        left, right = right.T, left.T
    if (len(left), right.shape[-1]) != weight.shape:
        raise ValueError(
            f"an adapter of {(len(left), right.shape[-1])} does not fit a weight of {weight.shape}; {MERGE_CURE}"
        )
    for start, stop in weight.spans(weight.shape[1] * wide.itemsize):
        change = left[start:stop] @ right
        yield (weight.rows(start, stop).to(wide) + adapter.scaling * change).to(weight.dtype).reshape(-1)


def _adapter(
    weight: str, pair: Mapping[str, StoredTensor], settings: LoRASettings, module: str, embedding: bool
) -> Adapter:
    if set(pair) != {"A", "B"} or any(len(t.shape) != 2 for t in pair.values()):
        raise ValueError(f"{weight}: expected two matrices lora_A and lora_B, got {sorted(pair)}; {MERGE_CURE}")
    rank, expected = pair["A"].shape[0], settings.rank(module)
    if not rank == pair["B"].shape[1] == expected:
        raise ValueError(
            f"{weight}: adapters of rank {rank}, but the hyper-parameters say r = {expected}; {MERGE_CURE}"
        )
    return Adapter(pair["A"], pair["B"], settings.scaling(module), embedding)
