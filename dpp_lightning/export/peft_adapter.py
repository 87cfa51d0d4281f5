"""A delta of low rank as an ordinary LoRA adapter of peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

Every module has the rank of its own factors, and alpha is that rank, so that what peft adds is the product as it is.
The bias of an adapted module is the bias of its ``lora_B``. Tensors that no LoRA layer has, of norms, of a head and
of modules whose weight the model reads itself, are those of ``modules_to_save``: base plus delta, for which the base's
values are needed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpp_lightning.delta.contents import DeltaContents, DeltaInfo
from dpp_lightning.delta.match_tensors import base_samples, check_digest, find_tensors
from dpp_lightning.export.lora_layers import CONVOLUTIONS, takes_lora
from dpp_lightning.export.module_places import replaceable, shared_modules
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.safetensors_writer import write_tensors
from dpp_lightning.tensors.dtypes import FLOATS
from dpp_lightning.tensors.factors import Factors
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.flat_entries import EntriesHash, add_rescaled, gather_entries
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import NamedTensor, named_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_DTYPES = ("float32", "bfloat16", "float16")
_PREFIX = "base_model.model."  # before the names of the model in an adapter's file
_CURE = "dpp apply BASE DELTA writes the whole model"
_SHOWN = 3

Find = Callable[[str], "Tensor | None"]  # a tensor of the fine-tuned model, by its name in the model


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter, ready to be written.

    Attributes:
        ranks: module to the rank of its factors, 1 or more.
        saved_modules: those that are saved whole.
        tensors: name in the file to tensor.
        lora_bias: adapted modules have biases.
        transposed: weights lie as (inputs, outputs), peft's ``fan_in_fan_out``.
        notes: what was left out, and what other engines do not load, for the user.
    """

    ranks: dict[str, int]
    saved_modules: tuple[str, ...]
    tensors: dict[str, Tensor]
    lora_bias: bool = False
    transposed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return total_bytes(self.tensors)

    def config(self, base: str | None = None, revision: str | None = None) -> LoraConfig:
        """peft's configuration, in the same order every time.

        Args:
            base: folder or hub id of the base model, for ``base_model_name_or_path``.
            revision: branch, tag or commit of a hub id.
        """
        largest = max(self.ranks.values())
        others = {f"^{module}": rank for module, rank in self.ranks.items() if rank != largest}
        config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=list(self.ranks),
            modules_to_save=list(self.saved_modules) or None,
            lora_bias=self.lora_bias,
            fan_in_fan_out=self.transposed,
            inference_mode=True,
            base_model_name_or_path=base,
            revision=revision,
        )
        config.target_modules = list(self.ranks)  # peft makes a set of it, which has another order in every process
        return config

    def write(self, folder: Path, base: str | None = None, revision: str | None = None) -> None:
        """Write the adapter's two files into a folder that is there.

        Args:
            folder: exists.
            base, revision: as for :meth:`config`.

        Raises:
            OSError: it cannot be written.
        """
        settings = self.config(base, revision).to_dict()
        text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_tensors(folder / WEIGHTS_FILE, self.tensors)


def make_adapter(
    contents: DeltaContents,
    model: PreTrainedModel,
    base: Mapping[str, Tensor],
    *,
    dtype: str = "float32",
    lora_only: bool = False,
    force: bool = False,
    where: str = "the delta",
    base_name: str = "the base",
) -> PeftAdapter:
    """A delta of low rank as a LoRA adapter.

    Args:
        contents: of the delta; every pruned tensor consists of factors alone.
        model: of the fine-tuned class and configuration, on the meta device; peft's layers are put into it.
        base: canonical name to tensor of the base.
        dtype: of factors and biases, one of ``ADAPTER_DTYPES``. Modules that are saved whole have the base's dtype.
        lora_only: leave out biases, norms and heads, which engines other than peft do not load; a note names them.
        force: take the base although it is another one than the delta was drawn from.
        where, base_name: what messages call the delta and the base.

    Raises:
        ValueError: the delta has kept entries or new rows, does not fit the model, the base is another one, or a tensor
            changes that neither a LoRA layer nor a module saved whole can hold.
    """
    if dtype not in ADAPTER_DTYPES:
        raise ValueError(f"dtype of a LoRA adapter must be one of {', '.join(ADAPTER_DTYPES)}, got {dtype!r}")
    contents = contents.for_task(None)
    factors = _read_factors(contents, base, where, base_name, force=force)
    places = _places(contents, model)
    by_name = {places[name].source: part for name, part in factors.items() if _changes(part)}
    carried = {places[name].source: tensor for name, tensor in contents.carried.items()}
    changed = {**dict.fromkeys(carried), **dict.fromkeys(by_name)}
    if not by_name:
        raise ValueError(f"{where} changes no linear map or convolution: a LoRA adapter of it would be empty")
    shared = shared_modules(model)
    whole = [name for name in changed if name in carried or _owner(name) in shared or not _in_lora(model, name)]
    saved = [] if lora_only else _saved_modules(model, whole, shared)
    adapted = [name for name in by_name if name not in whole and not _lies_in(name, saved)]
    adapter = _adapted(model, {name: by_name[name] for name in adapted}, FLOATS[dtype], lora_only=lora_only)
    if not adapter.ranks:
        inside = (
            f" beside {_few(whole)}, with which modules are saved whole: --lora_only leaves them out" if saved else ""
        )
        raise ValueError(f"{where} changes no linear map or convolution that LoRA could adapt{inside}; {_CURE}")
    if lora_only:
        adapter = replace(adapter, notes=_left_out(adapted, whole))
    else:
        without_bias = [path for path in adapter.ranks if model.get_submodule(path).bias is None]
        find = _finetuned(named_tensors(model), by_name, carried, base)
        adapter = replace(
            adapter,
            saved_modules=tuple(saved),
            tensors=adapter.tensors | _saved_tensors(model, saved, find),
            notes=_beyond_lora(adapter, saved, without_bias),
        )
    _check_loads(adapter, model)
    return adapter


def _read_factors(
    contents: DeltaContents, base: Mapping[str, Tensor], where: str, base_name: str, *, force: bool
) -> dict[str, Factors]:
    """The factors of every pruned tensor; the base's values are checked on the way."""
    info, check, factors = contents.info(), EntriesHash(), {}
    if contents.new_rows:
        raise ValueError(f"{where} has new rows of {_few(contents.new_rows)}, which no LoRA adapter holds: {_CURE}")
    shapes: dict[str, tuple[int, ...] | None] = dict(contents.table)
    in_base = find_tensors(shapes, base, base_name, info)
    for name, tensor in contents.tensors():
        if tensor.factors is None or tensor.values.numel():
            raise ValueError(_no_factors(name, info, where, has_factors=tensor.factors is not None))
        factors[name] = tensor.factors
        if not force:
            check.update(gather_entries(in_base[name], tensor.changed))
    if not force:
        check_digest(check, info, base_samples(contents, base, base_name), base_name)
    return factors


def _no_factors(name: str, info: DeltaInfo, where: str, *, has_factors: bool) -> str:
    if has_factors:
        return (
            f"{where} has a sampled rest beside its factors, of {name} for one, which no LoRA adapter holds: prune "
            f"with rest=1 (--method_settings.rest 1), or {_CURE}"
        )
    return (
        f"{where} is of method {info.method}: it keeps single entries, of {name} for one, which no LoRA adapter holds; "
        f"prune with --method lowrank, or {_CURE}"
    )


def _places(contents: DeltaContents, model: PreTrainedModel) -> dict[str, NamedTensor]:
    """The delta's names to where these tensors lie in the model.

    Raises:
        ValueError: names or shapes that are not the model's, or tensors that it holds in other pieces than its files.
    """
    shapes: dict[str, tuple[int, ...] | None] = dict(contents.table)
    shapes |= {name: tuple(tensor.shape) for name, tensor in contents.carried.items()}
    named = [(n, n.tensor) for n in named_tensors(model)]
    found = find_tensors(shapes, {n.name: t for n, t in named}, type(model).__name__, contents.info())
    by_tensor = {id(tensor): n for n, tensor in named}
    places = {name: by_tensor[id(tensor)] for name, tensor in found.items()}
    if parts := [name for name, place in places.items() if not place.whole]:
        raise ValueError(
            f"{type(model).__name__} holds {_few(parts)} in memory as parts of other tensors, which no LoRA adapter "
            f"changes singly: {_CURE}"
        )
    return places


def _changes(factors: Factors) -> bool:
    return bool(factors.left.any()) and bool(factors.right.any())


def _in_lora(model: nn.Module, name: str) -> bool:
    """Whether a LoRA layer holds a tensor: the weight or the bias of a module that takes one."""
    path, _, leaf = name.rpartition(".")
    return leaf in ("weight", "bias") and replaceable(model, path) == path and takes_lora(model, path)


def _owner(name: str) -> str:
    """The module that a tensor lies in."""
    return name.rpartition(".")[0]


def _saved_modules(model: nn.Module, whole: list[str], shared: Collection[str]) -> list[str]:
    """The outermost modules of changed tensors that no LoRA layer holds.

    Raises:
        ValueError: such a tensor belongs to the model as a whole, or is tied to another one.
    """
    names: dict[str, str] = {}
    for name in whole:
        names.setdefault(replaceable(model, _owner(name)), name)
    outermost = {m: n for m, n in names.items() if not any(_lies_in(m, [other]) for other in names if other != m)}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for module, name in outermost.items():
        if module in ("", getattr(model, "base_model_prefix", "")):
            raise ValueError(f"{name} is in no module of its own, so that no LoRA adapter changes it: {_CURE}")
        if both := [key for pair in tied.items() for key in pair if _lies_in(key, [module])]:
            raise ValueError(f"{both[0]} is tied to another tensor, so that no LoRA adapter changes it: {_CURE}")
        if several := [path for path in shared if _lies_in(f"{path}.", [module])]:
            raise ValueError(
                f"{min(several)} is in several places of the model, so that no adapter changes it: {_CURE}"
            )
    return list(outermost)


def _lies_in(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _adapted(model: nn.Module, factors: Mapping[str, Factors], dtype: torch.dtype, *, lora_only: bool) -> PeftAdapter:
    """The LoRA layers: the sides of every weight's factors, and of every bias its delta."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in factors if not lora_only or name.endswith(".weight"))
    lora_bias = not lora_only and any(name.endswith(".bias") for name in factors)
    tensors, ranks = {}, {}
    for path in modules:
        module = model.get_submodule(path)
        a, b = _sides(module, factors.get(f"{path}.weight"))
        ranks[path] = len(a)
        of_layer = {"lora_A.weight": a, "lora_B.weight": b}
        if lora_bias:
            bias = factors.get(f"{path}.bias")
            of_layer["lora_B.bias"] = torch.zeros(b.shape[0]) if bias is None else bias.product()
        for part, numbers in of_layer.items():
            tensors[f"{_PREFIX}{path}.{part}"] = _cast(numbers, dtype, path)
    transposed = any(isinstance(model.get_submodule(path), Conv1D) for path in modules)
    return PeftAdapter(ranks, (), tensors, lora_bias, transposed)


def _sides(module: nn.Module, factors: Factors | None) -> tuple[Tensor, Tensor]:
    """peft's A, first dimension the rank, and B, second dimension the rank; of a weight that stays, zeros of rank 1."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape[0], weight.shape[1:].numel()
    left, right = (factors.left, factors.right) if factors else (torch.zeros(rows, 1), torch.zeros(1, columns))
    if isinstance(module, Conv1D):  # its weight is (inputs, outputs)
        return left.t(), right.t()
    if isinstance(module, CONVOLUTIONS):
        ones = (1,) * (weight.dim() - 2)
        return right.reshape(-1, *weight.shape[1:]), left.reshape(*left.shape, *ones)
    return right, left


def _cast(numbers: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    cast = numbers.to(dtype).contiguous()
    if not is_finite(cast):
        raise ValueError(f"{module}: the factors are not finite in {dtype}; take --dtype bfloat16 or float32")
    return cast


def _finetuned(
    named: list[NamedTensor], factors: Mapping[str, Factors], carried: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> Find:
    """Gives base plus delta of a tensor, by its name in the model, in the base's dtype; None where no one has it."""
    in_base = match_names([n.name for n in named], base)
    canonical = {n.source: n.name for n in named}

    def find(name: str) -> Tensor | None:
        if name in carried:
            return carried[name]
        if canonical.get(name) not in in_base:
            return None
        tensor = base[in_base[canonical[name]]].detach()
        if name not in factors:
            return tensor
        return add_rescaled(tensor, factors[name].product().view(tensor.shape), 1.0)

    return find


def _saved_tensors(model: nn.Module, modules: list[str], find: Find) -> dict[str, Tensor]:
    """All tensors of the modules that are saved whole, under their names in the adapter's file."""
    tensors, lacking = {}, []
    for path in modules:
        for name in model.get_submodule(path).state_dict(prefix=f"{path}."):
            tensor = find(name)
            if tensor is None:
                lacking.append(name)
            else:
                tensors[_PREFIX + name] = tensor.clone(memory_format=torch.contiguous_format)
    if lacking:
        raise ValueError(f"neither the base nor the delta has {_few(lacking)}, which the adapter needs: {_CURE}")
    return tensors


def _left_out(adapted: list[str], whole: list[str]) -> tuple[str, ...]:
    biases = [name for name in adapted if not name.endswith(".weight")]
    parts = (("biases", biases), ("tensors that no LoRA layer has", whole))
    left = [f"{len(names)} {what} ({_few(names)})" for what, names in parts if names]
    return (f"left out, so that these are the base's: {' and '.join(left)}",) if left else ()


def _beyond_lora(adapter: PeftAdapter, saved: list[str], without_bias: list[str]) -> tuple[str, ...]:
    """What an engine that takes LoRA weights alone does not load, and what peft does not merge."""
    what = ["biases"] if adapter.lora_bias else []
    what += [f"{len(saved)} modules saved whole ({_few(saved)})"] if saved else []
    notes = []
    if what:
        notes.append(
            f"peft loads {' and '.join(what)} too; vLLM and other engines take LoRA weights alone and refuse them: for "
            "those give --lora_only"
        )
    if adapter.lora_bias and without_bias:
        notes.append(
            f"{_few(without_bias)} have no bias where other adapted modules have one, so that peft's merge_and_unload "
            f"refuses this adapter: {_CURE}"
        )
    return tuple(notes)


def _check_loads(adapter: PeftAdapter, model: PreTrainedModel) -> None:
    """Load the adapter without values into the model by peft itself, which finds every tensor, or refuse.

    Raises:
        ValueError: peft adapts or saves other modules than were meant, as where one's name ends as another's.
    """
    outlines = {name: torch.empty_like(tensor, device="meta") for name, tensor in adapter.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(model, adapter.config(), low_cpu_mem_usage=True)  # type: ignore[arg-type]
            result: Any = set_peft_model_state_dict(wrapped, outlines, low_cpu_mem_usage=True)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"peft does not load this adapter into {type(model).__name__}: {reason}; {_CURE}"
            ) from error
    lacking = [name for name in result.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if lacking or result.unexpected_keys:
        raise ValueError(
            f"peft does not load this adapter into {type(model).__name__} tensor by tensor "
            f"({_few([*lacking, *result.unexpected_keys])}): {_CURE}"
        )


def _few(names: Mapping[str, object] | list[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
