"""Two ways to prune a LoRA adapter: its parameters A and B, whose base is zero, or the delta it adds to the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.storage.output_folder import FolderKind, output_folder
from dpp_lightning.storage.safetensors_writer import write_tensors
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.names import canonical_tensors, named_tensors

if TYPE_CHECKING:
    from peft import PeftModel

AdapterView = Literal["adapter", "merged"]
ADAPTER_FOLDER, ADAPTER_FILE, ADAPTER_CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
_ADAPTER = FolderKind("an adapter", (ADAPTER_FILE, ADAPTER_CONFIG))
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LORA_PREFIX = "lora_"  # peft: lora_A, lora_B, lora_embedding_A, ...


def find_adapter(module: nn.Module, kind: AdapterView | None = None) -> PeftModel | None:
    """The ``PeftModel`` inside a module, or None.

    Args:
        module: any module.
        kind: how the user asked to prune its adapter; None where the user did not ask.

    Raises:
        ValueError: if there are several, if its active adapter is not a single one of plain LoRA, or if there is none
            although ``kind`` asks for one.
    """
    peft_models = []
    if "peft" in sys.modules:  # where peft was never imported no module holds a PeftModel
        from peft import PeftModel

        peft_models = [child for child in module.modules() if isinstance(child, PeftModel)]
    if not peft_models and kind is not None:
        raise ValueError(
            f"lora={kind!r}, but {type(module).__name__} holds no PeftModel; leave lora= out, or "
            "train adapters: GLUEModule(lora=LoRA(r=8)), or peft.get_peft_model"
        )
    if len(peft_models) > 1:
        raise ValueError(f"{type(module).__name__} holds {len(peft_models)} PeftModels, expected one adapter to prune")
    for adapter in peft_models:
        _check_plain_lora(adapter)
    return peft_models[0] if peft_models else None


@contextmanager
def adapter_view(
    module: nn.Module, base: BaseWeights, kind: AdapterView | None, *, keep: bool = False
) -> Iterator[BaseWeights]:
    """Show the module and its base as pruning needs them, for the time of the block.

    With ``adapter`` the base of the adapter's parameters is zero. With ``merged`` the module is the plain model without
    adapter layers: each adapted weight is W + scaling B A, its base W. A module without an adapter is left as it is.
    After the block the module is as before, bit for bit.

    Args:
        module: that is trained.
        base: theta_0 of its tensors.
        kind: ``adapter`` or ``merged``; None means ``adapter``.
        keep: with ``merged``, the weights that the block leaves stay in the module, and B becomes zero.

    Yields:
        The base of what is pruned.

    Raises:
        ValueError: if the module's adapter cannot be pruned, see :func:`find_adapter`.
    """
    adapter = find_adapter(module, kind)
    if adapter is None:
        yield base
    elif kind == "merged":
        _check_mergeable(adapter)
        # inside the block the tensors have other names, so they are recognised by their identity
        known = {n.identity: n.name for n in named_tensors(module) if n.name in base.tensors}
        with _merged(_lora_layers(adapter), keep=keep), _unwrapped(adapter):
            saved = base.saved
            names = {n.name: known[n.identity] for n in named_tensors(module) if n.identity in known}
            plain = {name: base.tensors[wrapped] for name, wrapped in names.items()}
            saved = {name: saved[wrapped] for name, wrapped in names.items() if wrapped in saved}
            yield BaseWeights(plain, explicit=base.explicit, saved=saved)
    else:
        active = adapter.active_adapters[0]
        tensors = canonical_tensors(module)
        zeros = {name: torch.zeros_like(t) for name, t in tensors.items() if is_lora_parameter(name, active)}
        yield BaseWeights({**base.tensors, **zeros}, explicit=base.explicit, saved=base.saved)


def save_adapter(adapter: PeftModel, folder: Path) -> None:
    """Write the active adapter and its ``modules_to_save`` into a folder for ``PeftModel.from_pretrained``.

    Args:
        adapter: the model with its adapter.
        folder: appears when all files are written, or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    from peft import get_peft_model_state_dict

    name = adapter.active_adapters[0]
    state = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}
    config = copy(adapter.peft_config[name])
    config.inference_mode = True
    with output_folder(folder, _ADAPTER, overwrite=True) as temporary:
        write_tensors(temporary / ADAPTER_FILE, tensors)
        config.save_pretrained(str(temporary))


def is_lora_parameter(name: str, adapter: str | None = None) -> bool:
    """Whether a tensor is of an adapter, as ``lora_A.default.weight``.

    Args:
        name: of the tensor.
        adapter: name of the only adapter that counts; None for any.
    """
    parts = name.split(".")
    return any(a.startswith(_LORA_PREFIX) and adapter in (None, b) for a, b in pairwise([*parts, ""]))


def _lora_layers(adapter: nn.Module) -> list[Any]:
    """The layers that hold A and B around an adapted layer (peft has no type for "LoraLayer and Module")."""
    from peft.tuners.lora import LoraLayer

    return [child for child in adapter.modules() if isinstance(child, LoraLayer)]


def _check_plain_lora(adapter: PeftModel) -> None:
    active = list(adapter.active_adapters)
    config = adapter.peft_config[active[0]] if active else None
    kind = str(getattr(config, "peft_type", "none"))
    if len(active) != 1 or not kind.endswith("LORA") or any(layer.lora_variant for layer in _lora_layers(adapter)):
        dora = " with DoRA" if getattr(config, "use_dora", False) else ""
        raise ValueError(
            f"found the active adapters {active} of type {kind}{dora}; expected a single one of plain LoRA, "
            "whose delta is scaling B A"
        )
    start = str(getattr(config, "init_lora_weights", True))
    if start.lower().startswith(_CHANGING_THE_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} takes a part of the base's weights into the adapter, so that neither the "
            "adapter nor the base in memory is of the base that was loaded: take another initialisation"
        )


def _check_mergeable(adapter: nn.Module) -> None:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if any(isinstance(child, TrainableTokensLayer) for child in adapter.modules()):
        raise ValueError(
            "lora='merged' does not merge trainable_token_indices, whose rows peft keeps apart: take lora='adapter', "
            "or train the embedding by modules_to_save"
        )


@contextmanager
@torch.no_grad()
def _merged(layers: list[Any], *, keep: bool) -> Iterator[None]:
    """Inside the block the adapted layers' weights are W + scaling B A.

    peft's ``unmerge`` would subtract, which leaves rounding behind; so W is copied before and put back after.
    """
    weights = [p for layer in layers for p in layer.get_base_layer().parameters()]
    before = [p.detach().clone() for p in weights]
    kept = False

    def restore() -> None:
        for layer in layers:
            layer.merged_adapters.clear()
            for name, parameter in layer.named_parameters():
                if kept and name.startswith(("lora_B.", "lora_embedding_B.")):
                    parameter.zero_()
        for parameter, original in zip(weights, before, strict=True):
            if not kept:
                parameter.copy_(original)

    with restored_after(restore):
        for layer in layers:
            layer.merge()
        yield
        kept = keep


@contextmanager
def _unwrapped(adapter: nn.Module) -> Iterator[None]:
    """Inside the block the plain layers take the places of the layers that peft wrapped around them."""
    from peft.utils import ModulesToSaveWrapper

    wrappers: list[tuple[nn.Module, str, nn.Module]] = []

    def restore() -> None:
        for parent, attribute, wrapper in wrappers:
            setattr(parent, attribute, wrapper)

    with restored_after(restore):
        plain = {id(layer): layer.get_base_layer() for layer in _lora_layers(adapter)}
        plain |= {id(m): _trained_copy(m) for m in adapter.modules() if isinstance(m, ModulesToSaveWrapper)}
        for name, child in list(adapter.named_modules()):
            if id(child) in plain:
                parent_name, _, attribute = name.rpartition(".")
                parent = adapter.get_submodule(parent_name)
                wrappers.append((parent, attribute, child))
                setattr(parent, attribute, plain[id(child)])
        yield


def _trained_copy(wrapper: Any) -> nn.Module:
    """The copy of a module that is trained in full beside the active adapter."""
    return wrapper.modules_to_save[wrapper.active_adapters[0]]
