"""A LoRA adapter as pruning sees it: its own parameters, whose base is zero, or merged into the layers it adapts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.storage.atomic_write import atomic_folder
from dpp_lightning.tensors.names import canonical_tensors

if TYPE_CHECKING:
    from peft import PeftModel

AdapterView = Literal["adapter", "merged"]
ADAPTER_FOLDER, ADAPTER_FILE, ADAPTER_CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
_OWN = "lora_"  # what names of an adapter's own parameters begin with


def find_adapter(module: nn.Module, kind: AdapterView | None = None) -> PeftModel | None:
    """The ``PeftModel`` inside a module, or None.

    Args:
        module: any module.
        kind: how its adapter is to be pruned, if that was asked for.

    Raises:
        ValueError: more than one, one whose adapter is not plain LoRA or not active alone, or none though a kind was
            asked for.
    """
    found = []
    if "peft" in sys.modules:  # else nothing can hold one
        from peft import PeftModel

        found = [part for part in module.modules() if isinstance(part, PeftModel)]
    if not found and kind is not None:
        raise ValueError(
            f"DeltaPruneCallback(lora={kind!r}), but {type(module).__name__} holds no PeftModel; leave lora= out, or "
            "train adapters: GLUEModule(lora=LoRA(r=8)), or peft.get_peft_model"
        )
    if len(found) > 1:
        raise ValueError(f"{type(module).__name__} holds {len(found)} PeftModels, expected one adapter to prune")
    for adapter in found:
        _check_plain(adapter)
    return found[0] if found else None


@contextmanager
def adapter_view(
    module: nn.Module, base: BaseWeights, kind: AdapterView | None, *, keep: bool = False
) -> Iterator[BaseWeights]:
    """Inside the block the module and the base are those that pruning works on; without an adapter, as they are.

    ``adapter``: the base of the adapter's own parameters is zero. ``merged``: the module is the plain model, without
    adapter layers, each adapted weight W + scaling B A against W. Afterwards the module is as before, bit for bit.

    Args:
        module: the LightningModule.
        base: theta_0 of its tensors.
        kind: default ``adapter``.
        keep: what the merged weights are at the end of the block stays, with B = 0.

    Raises:
        ValueError: as :func:`find_adapter`.
    """
    adapter = find_adapter(module, kind)
    if adapter is None:
        yield base
    elif kind == "merged":
        own = canonical_tensors(module)
        known = {id(own[name]): tensor for name, tensor in base.tensors.items() if name in own}
        with _merged(_layers(adapter), keep=keep), _unwrapped(adapter):
            plain = {n: known[id(t)] for n, t in canonical_tensors(module).items() if id(t) in known}
            yield BaseWeights(plain, explicit=base.explicit)
    else:
        zeros = {n: torch.zeros_like(t) for n, t in canonical_tensors(module).items() if _is_own(n)}
        yield BaseWeights({**base.tensors, **zeros}, explicit=base.explicit)


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Write the active adapter as it stands, with its ``modules_to_save``, as ``PeftModel.from_pretrained`` reads it.

    Args:
        adapter: the model with its adapter.
        folder: made whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    from peft import get_peft_model_state_dict

    name = adapter.active_adapters[0]
    state = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    config = copy(adapter.peft_config[name])
    config.inference_mode = True
    with atomic_folder(folder, replaces=ADAPTER_CONFIG) as temporary:
        save_file(tensors, temporary / ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(temporary))


def _is_own(name: str) -> bool:
    return any(part.startswith(_OWN) for part in name.split("."))


def _layers(adapter: nn.Module) -> list[Any]:
    """The wrappers that hold A and B: each a ``LoraLayer`` and a module, which is no type of peft's."""
    from peft.tuners.lora import LoraLayer

    return [part for part in adapter.modules() if isinstance(part, LoraLayer)]


def _check_plain(adapter: PeftModel) -> None:
    active = list(adapter.active_adapters)
    config = adapter.peft_config[active[0]] if active else None
    kind = str(getattr(config, "peft_type", "none"))
    if len(active) != 1 or not kind.endswith("LORA") or any(layer.lora_variant for layer in _layers(adapter)):
        dora = " with DoRA" if getattr(config, "use_dora", False) else ""
        raise ValueError(
            f"found the active adapters {active} of type {kind}{dora}; expected a single one of plain LoRA, "
            "whose delta is scaling B A"
        )


@contextmanager
@torch.no_grad()
def _merged(layers: list[Any], *, keep: bool) -> Iterator[None]:
    """Inside the block the adapted layers' own weights are W + scaling B A."""
    weights = [p for layer in layers for p in layer.get_base_layer().parameters()]
    before = [p.detach().clone() for p in weights]
    kept = False
    try:
        for layer in layers:
            layer.merge()
        yield
        kept = keep
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
            for name, parameter in layer.named_parameters():
                if kept and name.startswith(("lora_B.", "lora_embedding_B.")):
                    parameter.zero_()
        for parameter, original in zip(weights, before, strict=True):
            if not kept:
                parameter.copy_(original)


@contextmanager
def _unwrapped(adapter: nn.Module) -> Iterator[None]:
    """Inside the block the plain layers stand where the adapter's wrappers do."""
    from peft.utils import ModulesToSaveWrapper

    wrappers: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        inner = {id(layer): layer.get_base_layer() for layer in _layers(adapter)}
        inner |= {id(p): _trained(p) for p in adapter.modules() if isinstance(p, ModulesToSaveWrapper)}
        for name, part in list(adapter.named_modules()):
            if id(part) in inner:
                parent, _, child = name.rpartition(".")
                holder = adapter.get_submodule(parent)
                setattr(holder, child, inner[id(part)])
                wrappers.append((holder, child, part))
        yield
    finally:
        for holder, child, part in wrappers:
            setattr(holder, child, part)


def _trained(wrapper: Any) -> nn.Module:
    """The copy of a module that is trained whole beside the active adapter."""
    return wrapper.modules_to_save[wrapper.active_adapters[0]]
