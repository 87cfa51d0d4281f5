"""One name per tensor: the canonical name of what a module, a wrapper or a file calls differently.

The hub's folder of a bare encoder says ``embeddings.word…``, a classifier built on it ``bert.embeddings.word…``, a
LightningModule ``model.bert.embeddings.word…``, and a compiled module adds ``_orig_mod.``. The name decides which
entries a random selection keeps, which tensors of two models belong together, and what is a new head, so the sampler,
the delta file, the callback and the command line all take it from here.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dpp_lightning.tensors.shards import has_unsupported_placements, is_fsdp1_shard

TensorSource = nn.Module | Mapping[str, Tensor]

_WRAPPER_NAMES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"})
# What transformers calls the base model inside a task model. A state dict has no module that could be asked for it.
_BASE_MODEL_PREFIXES = frozenset(
    {"albert", "bert", "deberta", "distilbert", "electra", "gpt_neox", "model", "roberta", "transformer", "vit"}
)
_ADAPTER_NAMES = re.compile(r"(^|\.)(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
_RUNNING_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def canonical_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Every parameter and persistent buffer of a module, or every tensor of a state dict, under its canonical name.

    The names of wrappers (``_orig_mod``, ``_fsdp_wrapped_module``, ...) are dropped, then the leading parts that all
    names share (a LightningModule's ``model.``), then the base model's prefix (``bert.``), unless two tensors would
    then have one name. A tied tensor appears once, under its first name.

    Args:
        source: ``nn.Module``, or a mapping of names to tensors (values that are not tensors are ignored).

    Returns:
        Canonical name to the tensor itself, not a copy (a ``Parameter`` for a module), in the source's order.

    Raises:
        ValueError: the source holds no tensor.
    """
    tensors = _source_tensors(source)
    if not tensors:
        raise ValueError(f"found no tensor in {type(source).__name__}: expected a module or state dict with weights")
    names = _strip_shared({name: without_wrappers(name) for name in tensors})
    prefixes = _module_prefixes(source) if isinstance(source, nn.Module) else _BASE_MODEL_PREFIXES
    return {canonical: tensors[name] for name, canonical in _strip_prefix(names, prefixes).items()}


def without_wrappers(name: str) -> str:
    """A tensor's name without what ``torch.compile``, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def without_adapters(name: str) -> str:
    """A tensor's name without what peft puts into it: ``query.base_layer.weight`` becomes ``query.weight``."""
    return _ADAPTER_NAMES.sub("", name).removeprefix(".")


def buffer_names(source: TensorSource) -> set[str]:
    """Canonical names of the tensors that are not parameters: a module's buffers, a state dict's running statistics."""
    tensors = canonical_tensors(source)
    if isinstance(source, nn.Module):
        return {name for name, tensor in tensors.items() if not isinstance(tensor, nn.Parameter)}
    return {name for name in tensors if name.rpartition(".")[2] in _RUNNING_STATISTICS}


def canonical_names(module: nn.Module) -> dict[str, str]:
    """The module's name of each of its tensors to the canonical one, ``model.bert.pooler.x`` to ``pooler.x``.

    A tied tensor appears under each of its names in the module.
    """
    by_tensor = {id(tensor): canonical for canonical, tensor in canonical_tensors(module).items()}
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_tensor}


def source_names(source: TensorSource) -> dict[str, str]:
    """Canonical name to the name in the source, with everything that wrappers put into it."""
    by_tensor = {id(tensor): name for name, tensor in _source_tensors(source).items()}
    return {canonical: by_tensor[id(tensor)] for canonical, tensor in canonical_tensors(source).items()}


def saved_names(source: TensorSource, *, exact: bool) -> tuple[str, dict[str, str]]:
    """How a model's files name its tensors: the prefix that most canonical names get, and the names that differ.

    Args:
        source: module or state dict.
        exact: the names in the source are those of the model's files to the letter. Otherwise what wrappers put into
            them, and the leading parts that all names share (a LightningModule's ``model.``), are dropped first.

    Returns:
        The prefix, possibly empty, and canonical name to name in the files where that is not prefix + canonical name.
    """
    names = source_names(source)
    if not exact:
        names = _strip_shared({canonical: without_wrappers(name) for canonical, name in names.items()})
    counts: dict[str, int] = {}
    for canonical, name in names.items():
        if name.endswith(canonical):
            prefix = name[: len(name) - len(canonical)]
            counts[prefix] = counts.get(prefix, 0) + 1
    usual = max(counts, key=lambda prefix: counts[prefix], default="")
    return usual, {canonical: name for canonical, name in names.items() if name != usual + canonical}


def describe_source(source: TensorSource) -> str:
    """What a message calls a module or state dict: its folder or hub id where it has one, and its class."""
    configured = getattr(getattr(source, "config", None), "name_or_path", "")
    return f"{configured} ({type(source).__name__})" if configured else f"the target ({type(source).__name__})"


def match_names(wanted: Iterable[str], offered: Iterable[str]) -> dict[str, str]:
    """Match two sets of canonical names that may still differ by one leading part (``bert.``).

    Of all leading parts that could be added to or removed from the wanted names, the one with the most matches is
    taken; equal names win over any leading part that matches no more.

    Args:
        wanted: names to look for.
        offered: names to look among.

    Returns:
        Wanted name to offered name; wanted names without a match are left out.
    """
    wanted, offered = list(wanted), set(offered)
    best = {name: name for name in wanted if name in offered}
    for prefix in sorted({name.split(".")[0] for name in (*wanted, *offered) if "." in name}):
        dot = prefix + "."
        added = {name: dot + name for name in wanted if dot + name in offered}
        removed = {name: name[len(dot) :] for name in wanted if name.startswith(dot) and name[len(dot) :] in offered}
        for renamed in (added, removed):
            candidate = {**{name: name for name in wanted if name in offered}, **renamed}
            if len(candidate) > len(best) and len(set(candidate.values())) == len(candidate):
                best = candidate
    return best


def _source_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Every tensor once, under its first name in the source."""
    return _module_tensors(source) if isinstance(source, nn.Module) else _mapping_tensors(source)


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
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and tensor.device.type != "meta" and memory in seen:
            continue  # a tied tensor under its second name
        seen.add(memory)
        tensors[name] = tensor
    return tensors


def _strip_shared(names: dict[str, str]) -> dict[str, str]:
    """Drop leading parts as long as every name shares them and keeps at least one part."""
    split = {name: canonical.split(".") for name, canonical in names.items()}
    while len({parts[0] for parts in split.values()}) == 1 and all(len(parts) > 1 for parts in split.values()):
        split = {name: parts[1:] for name, parts in split.items()}
    return {name: ".".join(parts) for name, parts in split.items()}


def _module_prefixes(module: nn.Module) -> frozenset[str]:
    prefixes = (getattr(submodule, "base_model_prefix", "") for submodule in module.modules())
    return frozenset(prefix for prefix in prefixes if isinstance(prefix, str) and prefix)


def _strip_prefix(names: dict[str, str], prefixes: frozenset[str]) -> dict[str, str]:
    """Drop one known base-model prefix per name; where two tensors would then have one name, both keep theirs."""
    stripped = {}
    for name, canonical in names.items():
        head, _, rest = canonical.partition(".")
        stripped[name] = rest if rest and head in prefixes else canonical
    counts: dict[str, int] = {}
    for canonical in stripped.values():
        counts[canonical] = counts.get(canonical, 0) + 1
    return {name: canonical if counts[canonical] == 1 else names[name] for name, canonical in stripped.items()}


def check_prunable(tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor has a delta in floating point.

    Raises:
        ValueError: a parameter is quantised, integer or complex, or a tensor is on the meta device, sparse or a shard
            of FSDP1; the message gives the names, at most 20, and the reason for each.
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
