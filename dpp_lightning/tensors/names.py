"""One name per tensor: from what a module, wrapper or file calls a tensor to its canonical name.

The hub's folder of a bare encoder says ``embeddings.word…``, a classifier built on it ``bert.embeddings.word…``, a
LightningModule ``model.bert.embeddings.word…``, a compiled one adds ``_orig_mod.``. Names decide mask, matching and
head, so the sampler, the file, the callback and the command line all take them from here.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dpp_lightning.tensors.shards import has_unsupported_placements, is_fsdp1_shard

TensorSource = nn.Module | Mapping[str, Tensor]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"})
# what transformers calls a base model inside a task model, for state dicts, which have no module to ask
_BASE_MODEL_PREFIXES = frozenset(
    {"albert", "bert", "deberta", "distilbert", "electra", "gpt_neox", "model", "roberta", "transformer", "vit"}
)
_ADAPTER_PARTS = re.compile(r"(^|\.)(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_RUNNING_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def canonical_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a module, or every tensor of a state dict, under its canonical name.

    Wrapper parts (``_orig_mod``, ``_fsdp_wrapped_module``, ...) are dropped, then the leading parts that all names
    share (a LightningModule's ``model.``), then the base model's prefix (``bert.``), unless two names would then be
    one. A tied tensor appears once, under its first name.

    Args:
        source: ``nn.Module`` or mapping of names to tensors (entries that are no tensors are ignored).

    Returns:
        Canonical name to the very tensor of the source (a ``Parameter`` for a module), in the source's order.

    Raises:
        ValueError: the source holds no tensor.
    """
    own = _module_tensors(source) if isinstance(source, nn.Module) else _mapping_tensors(source)
    if not own:
        raise ValueError(f"found no tensor in {type(source).__name__}: expected a module or state dict with weights")
    short = _strip_shared({name: without_wrappers(name) for name in own})
    prefixes = _module_prefixes(source) if isinstance(source, nn.Module) else _BASE_MODEL_PREFIXES
    return {canonical: own[name] for name, canonical in _strip_prefix(short, prefixes).items()}


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that ``torch.compile``, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_adapters(name: str) -> str:
    """A tensor's name without what peft puts into it: ``query.base_layer.weight`` to ``query.weight``."""
    return _ADAPTER_PARTS.sub("", name).removeprefix(".")


def buffer_names(source: TensorSource) -> set[str]:
    """Canonical names of what is no parameter: a module's buffers, or a state dict's running statistics."""
    tensors = canonical_tensors(source)
    if isinstance(source, nn.Module):
        return {name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}
    return {name for name in tensors if name.rpartition(".")[2] in _RUNNING_STATISTICS}


def canonical_names(module: nn.Module) -> dict[str, str]:
    """The module's own name of each of its tensors to the canonical one: ``model.bert.pooler.x`` to ``pooler.x``."""
    by_tensor = {id(tensor): canonical for canonical, tensor in canonical_tensors(module).items()}
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: by_tensor[id(tensor)] for name, tensor in own.items() if id(tensor) in by_tensor}


def source_names(source: TensorSource) -> dict[str, str]:
    """Canonical name to the source's own name, wrappers' parts and all."""
    own = _module_tensors(source) if isinstance(source, nn.Module) else _mapping_tensors(source)
    by_tensor = {id(tensor): name for name, tensor in own.items()}
    return {canonical: by_tensor[id(tensor)] for canonical, tensor in canonical_tensors(source).items()}


def saved_names(source: TensorSource, *, exact: bool) -> tuple[str, dict[str, str]]:
    """How the names in a model's own files follow from canonical ones: the usual prefix, and the names that differ.

    Args:
        source: module or state dict.
        exact: the source is a file of the model itself, so that its names are right to the letter; otherwise wrappers'
            parts and what all names share (a LightningModule's ``model.``) are no part of them.
    """
    names = source_names(source)
    if not exact:
        names = _strip_shared({canonical: without_wrappers(own) for canonical, own in names.items()})
    counts: dict[str, int] = {}
    for canonical, own in names.items():
        if own.endswith(canonical):
            prefix = own[: len(own) - len(canonical)]
            counts[prefix] = counts.get(prefix, 0) + 1
    usual = max(counts, key=lambda prefix: counts[prefix], default="")
    return usual, {canonical: own for canonical, own in names.items() if own != usual + canonical}


def describe_source(source: TensorSource) -> str:
    """What to call a module or state dict in a message: its folder or hub id where it has one."""
    configured = getattr(getattr(source, "config", None), "name_or_path", "")
    return f"{configured} ({type(source).__name__})" if configured else f"the target ({type(source).__name__})"


def match_names(wanted: Iterable[str], offered: Iterable[str]) -> dict[str, str]:
    """Match two sets of canonical names that may still differ by one leading part (``bert.``), by the most matches.

    Args:
        wanted: names to be found.
        offered: names at hand.

    Returns:
        Each wanted name that was found to the offered one; exact names win over any prefix at equal counts.
    """
    wanted, offered = list(wanted), set(offered)
    best = {name: name for name in wanted if name in offered}
    for prefix in sorted({name.split(".")[0] for name in (*wanted, *offered) if "." in name}):
        dot = prefix + "."
        added = {n: dot + n for n in wanted if dot + n in offered}
        removed = {n: n[len(dot) :] for n in wanted if n.startswith(dot) and n[len(dot) :] in offered}
        for candidate in (added, removed):
            candidate = {**{n: n for n in wanted if n in offered}, **candidate}
            if len(candidate) > len(best) and len(set(candidate.values())) == len(candidate):
                best = candidate
    return best


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    persistent = module.state_dict(keep_vars=True).keys()
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    tensors.update({name: buffer for name, buffer in module.named_buffers() if name in persistent})
    return tensors


def _mapping_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors, seen = {}, set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and tensor.device.type != "meta" and place in seen:
            continue  # a tied tensor under its second name
        seen.add(place)
        tensors[name] = tensor
    return tensors


def _strip_shared(names: dict[str, str]) -> dict[str, str]:
    """Drop leading parts as long as every name shares them and keeps at least one part."""
    split = {name: canonical.split(".") for name, canonical in names.items()}
    while len({parts[0] for parts in split.values()}) == 1 and all(len(parts) > 1 for parts in split.values()):
        split = {name: parts[1:] for name, parts in split.items()}
    return {name: ".".join(parts) for name, parts in split.items()}


def _module_prefixes(module: nn.Module) -> frozenset[str]:
    found = (getattr(m, "base_model_prefix", "") for m in module.modules())
    return frozenset(p for p in found if isinstance(p, str) and p)


def _strip_prefix(names: dict[str, str], prefixes: frozenset[str]) -> dict[str, str]:
    """Drop one known base-model prefix per name; where two names would become one, both keep theirs."""
    stripped = {}
    for name, canonical in names.items():
        head, _, rest = canonical.partition(".")
        stripped[name] = rest if rest and head in prefixes else canonical
    counts: dict[str, int] = {}
    for canonical in stripped.values():
        counts[canonical] = counts.get(canonical, 0) + 1
    return {name: canonical if counts[canonical] == 1 else names[name] for name, canonical in stripped.items()}


def check_prunable(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that have no delta in floating point: meta, quantised, complex, sparse ones, or shards of FSDP1.

    Raises:
        ValueError: with the names and what was found.
    """
    faults = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            faults.append(f"{name}: on the meta device (no values); materialise the model first")
        elif isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            faults.append(f"{name}: dtype {tensor.dtype}; quantised, integer or complex weights have no delta here")
        elif tensor.layout != torch.strided:
            faults.append(f"{name}: layout {tensor.layout}; expected a dense tensor")
        elif has_unsupported_placements(tensor):
            faults.append(f"{name}: placements {tensor.placements}; expected shards and replicas")  # type: ignore[attr-defined]
        elif is_fsdp1_shard(tensor):
            faults.append(f"{name}: flattened by FSDP1; take FSDP2Strategy (--config fsdp.yaml), DDP or one device")
    if faults:
        raise ValueError("these tensors cannot be pruned:\n  " + "\n  ".join(faults[:20]))
