"""LoRA adapters (by peft) in a checkpoint, merged into the weights they adapt a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.names import without_adapters, without_wrappers

_FACTOR = re.compile(r"(?P<layer>.*)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])\.(?P<adapter>[^.]+)(?:\.weight)?")
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)\.")
_CURE = "merge them before saving, with model.merge_and_unload()"


@dataclass(frozen=True)
class Adapter:
    """W + scaling B A of one weight.

    Attributes:
        a, b: shapes (r, inputs) and (outputs, r).
        scaling: alpha / r.
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
        hyper_parameters: of the checkpoint; ``lora`` has ``r`` and ``alpha``.

    Returns:
        Name, without the parts of wrappers and adapters, to tensor; name of the adapted weight to its adapter.

    Raises:
        ValueError: adapters of another kind than plain LoRA of linear and embedding layers, several of them, or
            adapters without ``r`` and ``alpha``.
    """
    plain: dict[str, StoredTensor] = {}
    factors: dict[str, dict[str, StoredTensor]] = {}
    adapters, embeddings = set(), set()
    for name, tensor in stored.items():
        name = without_wrappers(name)
        if match := _FACTOR.fullmatch(name):
            weight = f"{without_adapters(match['layer'] + '.')}weight"
            factors.setdefault(weight, {})[match["factor"]] = tensor
            adapters.add(match["adapter"])
            if match["embedding"]:
                embeddings.add(weight)
        elif ".lora_" in name:
            raise ValueError(f"{name}: expected adapters of plain LoRA (without DoRA and bias); {_CURE}")
        elif whole := _SAVED.search(name):
            adapters.add(whole["adapter"])
            plain[without_adapters(name)] = tensor
        elif ".original_module." in name:
            plain.setdefault(without_adapters(name), tensor)
        else:
            plain[without_adapters(name)] = tensor
    if len(adapters) > 1:
        raise ValueError(f"the checkpoint holds the adapters {', '.join(sorted(adapters))}, expected one; {_CURE}")
    return plain, {w: _adapter(w, pair, hyper_parameters, w in embeddings) for w, pair in factors.items()}


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
            f"an adapter of {(len(left), right.shape[-1])} does not fit a weight of {weight.shape}; {_CURE}"
        )
    for start, stop in weight.spans(weight.shape[1] * wide.itemsize):
        change = left[start:stop] @ right
        yield (weight.rows(start, stop).to(wide) + adapter.scaling * change).to(weight.dtype).reshape(-1)


def _adapter(
    weight: str, pair: Mapping[str, StoredTensor], hyper_parameters: Mapping[str, Any], embedding: bool
) -> Adapter:
    setting = hyper_parameters.get("lora")
    if not isinstance(setting, Mapping) or not all(isinstance(setting.get(n), int | float) for n in ("r", "alpha")):
        raise ValueError(
            f"the checkpoint holds LoRA adapters, of {weight} for one, but not their scale, the hyper-parameters "
            f"lora = {{r, alpha}}; {_CURE}"
        )
    if set(pair) != {"A", "B"} or any(len(t.shape) != 2 for t in pair.values()):
        raise ValueError(f"{weight}: expected two matrices lora_A and lora_B, got {sorted(pair)}; {_CURE}")
    rank = pair["A"].shape[0]
    if not rank == pair["B"].shape[1] == setting["r"]:
        raise ValueError(f"{weight}: adapters of rank {rank}, but the hyper-parameters say r = {setting['r']}; {_CURE}")
    return Adapter(pair["A"], pair["B"], float(setting["alpha"]) / rank, embedding)
