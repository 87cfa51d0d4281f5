"""One name per tensor: the canonical name of what a module, a wrapper or a file calls differently.

The canonical name is that of the model's own files, without the base model's prefix. The hub's folder of a bare encoder
says ``embeddings.word…``, a classifier built on it ``bert.embeddings.word…``, a LightningModule
``model.bert.embeddings.word…``, a compiled module adds ``_orig_mod.``, and transformers holds some tensors in memory
under other names, or several as one, see :mod:`dpp_lightning.tensors.hf_layout`. The name decides which entries a
random selection keeps, which tensors of two models belong together, and what is a new head, so the sampler, the delta
file, the callback and the command line all take it from here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dpp_lightning.tensors.blocks import is_buffer_name
from dpp_lightning.tensors.hf_layout import FilePlace, file_layout, transformers_models
from dpp_lightning.tensors.quantised import check_not_quantised
from dpp_lightning.tensors.shards import has_unsupported_placements, is_dtensor, is_fsdp1_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TensorSource = nn.Module | Mapping[str, Tensor]

_WRAPPER_NAMES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module"})
# What transformers calls the base model inside a task model (``base_model_prefix``). Names of parts that a model has
# beside others (encoder, decoder, text_model, vision_model, language_model) are not among them.
BASE_MODEL_PREFIXES = frozenset(
    re.findall(
        r"\w+",
        """albert align altclip audio_spectrogram_transformer backbone beit bert biogpt bit blip bridgetower bros canine
    chinese_clip clap clip convbert convnext convnextv2 cpmant cvt dac data2vec_audio data2vec_text data2vec_vision
    deberta decision_transformer deit depth_anything dinat dinov2 dinov2_with_registers distilbert donut dpt
    efficientloftr efficientnet electra encodec ernie esm esmc fastspeech2_conformer flava fnet focalnet funnel git glpn
    gpt_neox gpt_neox_japanese groupvit gte hgnetv2 hiera hubert ibert ijepa layoutlm layoutlmv2 layoutlmv3 led levit
    lilt longformer luke lxmert markuplm mgp_str mimi mobilebert mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 model
    mpnet mra nomic_bert nystromformer owlv2 owlvit perceiver poolformer prophetnet pvt pvt_v2 rag reformer regnet
    rembert resnet roberta roberta_prelayernorm roc_bert roformer rwkv sam seamless_m4t seamless_m4t_v2 segformer sew
    sew_d siglip siglip2 speecht5 splinter superpoint swiftformer swin swin2sr swinv2 switch_transformers tapas textnet
    timesformer transformer unispeech unispeech_sat videomae vilt visual_bert vit vitdet vits vivit vjepa2 wav2vec2
    wav2vec2_bert wav2vec2_conformer wavlm x_clip xcodec yoso zoedepth""",
    )
)
_OLD_SPELLINGS = (  # of older files; what they became in newer ones
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
    (re.compile(r"^language_model\.model\.model\."), "language_model.model."),
)
_PATH_TO_BLOCKS = frozenset({"encoder", "decoder"})  # their parts are a model's own, even where it has no others
_EMBEDDINGS = ("shared", "embed", "wte")  # in the names of input embeddings; the first is the one that others share
_NUMBERED = re.compile(  # what holds parts by number; a change of these words changes names, and with them masks
    r"(?:\w+_)?(?:layers?|blocks?)\d*|h|stages?|levels|features|experts|resblocks"
)
_SHOWN = 4  # names in a message
_ADAPTER_NAMES = re.compile(r"(^|\.)(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of a source.

    Attributes:
        name: canonical.
        source: the name in the source, with everything that wrappers put into it.
        saved: what the model's own files call it, as far as the source tells.
        owner: the source's tensor, a ``Parameter`` for a module; the first of several.
        place: which part of the owner it is.
        in_model: it is of a model of transformers inside a module.
        more: further tensors of the source whose rows follow, where the files hold several as one.
    """

    name: str
    source: str
    saved: str
    owner: Tensor
    place: FilePlace
    in_model: bool = False
    more: tuple[tuple[Tensor, FilePlace], ...] = ()

    @property
    def pieces(self) -> list[tuple[Tensor, FilePlace]]:
        """The source's tensors that it consists of, and which part of each."""
        return [(self.owner, self.place), *self.more]

    @property
    def tensor(self) -> Tensor:
        """The tensor itself: the owner, or a view of a part of it; a copy where it consists of several."""
        return self.of({id(owner): owner for owner, _ in self.pieces})

    @property
    def whole(self) -> bool:
        """Whether it is all of its owner and nothing else."""
        return self.place.size is None and not self.more

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two names of one tensor, or of one part of a tensor, of a module."""
        return tuple((id(owner), place.size, place.stride, place.offset) for owner, place in self.pieces)

    def of(self, values: Mapping[int, Tensor]) -> Tensor:
        """The same part of other tensors, such as gradients.

        Args:
            values: identity of each owner to a tensor of its shape.
        """
        parts = [place.of(values[id(owner)]) for owner, place in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat([part.detach() for part in parts])

    @torch.no_grad()
    def store(self, tensor: Tensor) -> None:
        """Write what :attr:`tensor` gave back into the source, after it was overwritten; needed for a copy alone."""
        if self.more:
            parts = [place.of(owner).detach() for owner, place in self.pieces]
            for part, values in zip(parts, tensor.split([len(part) for part in parts]), strict=True):
                part.copy_(values)


def named_tensors(
    source: TensorSource, *, like: TensorSource | None = None, in_memory: bool = False
) -> list[NamedTensor]:
    """Every parameter and persistent buffer of a module, or every tensor of a state dict, with its names.

    The tensors of a transformers model, wherever it is in a module, have the names of its files. Of other sources the
    names of wrappers (``_orig_mod``, ``_fsdp_wrapped_module``, ...) are dropped, then the leading parts that all names
    share (a LightningModule's ``model.``) as far as they do not lead to numbered blocks; then the base model's prefix
    (``bert.``), unless two tensors would then have one name. A tied tensor appears once, under its first name.

    Args:
        source: ``nn.Module``, or a mapping of names to tensors (values that are not tensors are ignored).
        like: a module that tells what the tensors of a mapping are, where that is its state dict or that of a copy.
        in_memory: models of transformers have the names of their state dict, not of their files.

    Raises:
        ValueError: the source holds no tensor, or tensors in shards that the files hold in other pieces.
    """
    tensors = _source_tensors(source)
    if not tensors:
        raise ValueError(f"found no tensor in {type(source).__name__}: expected a module or state dict with weights")
    module = source if isinstance(source, nn.Module) else like
    if isinstance(module, nn.Module) and not in_memory and (models := transformers_models(module)):
        of_model = tensors if isinstance(source, nn.Module) else _like_module(source, _module_tensors(module))
        if of_model is not None:
            named = _of_models(module, of_model, models)
            _check_parts(named)
            return _canonical(named)
    return _canonical([_as_it_is(name, tensor) for name, tensor in tensors.items()])


def canonical_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Canonical name to tensor, of every tensor of :func:`named_tensors`.

    Returns:
        The tensors themselves (a ``Parameter`` of a module, or a view of a part of one), in the source's order. Those
        that the files hold as one and the module as several are copies, see :meth:`NamedTensor.store`.

    Raises:
        ValueError: as :func:`named_tensors`.
    """
    return {named.name: named.tensor for named in named_tensors(source)}


def owners(source: TensorSource) -> dict[str, Tensor]:
    """Canonical name to the source's tensor that the tensor is, or is a part of; the first where it joins several."""
    return {named.name: named.owner for named in named_tensors(source)}


def without_wrappers(name: str) -> str:
    """A tensor's name without what ``torch.compile``, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES)


def without_adapters(name: str) -> str:
    """A tensor's name without what peft puts into it: ``query.base_layer.weight`` becomes ``query.weight``."""
    return _ADAPTER_NAMES.sub("", name).removeprefix(".")


def buffer_names(source: TensorSource) -> set[str]:
    """Canonical names of the tensors that are statistics or constants rather than parameters, see
    :func:`buffers_among`."""
    return buffers_among(named_tensors(source), source)


def buffers_among(named: Iterable[NamedTensor], source: TensorSource) -> set[str]:
    """The names, among those of a source's tensors, of those that are statistics or constants rather than parameters.

    In a state dict, and in a model of transformers so that it does not matter how that is held, they are known by their
    names (``running_mean``, ``final_logits_bias``, ...); all other buffers of a module are what the module says.
    """
    by_type = isinstance(source, nn.Module)
    return {
        n.name
        for n in named
        if is_buffer_name(n.name) or (by_type and not n.in_model and not isinstance(n.owner, nn.Parameter))
    }


def has_file_names(source: TensorSource) -> bool:
    """Whether a source itself tells what the model's files call its tensors: a module with one transformers model, or
    one that is trained."""
    return isinstance(source, nn.Module) and len(_meant_models(source, transformers_models(source))) == 1


def canonical_names(module: nn.Module) -> dict[str, str]:
    """The module's name of each of its tensors to the canonical one, ``model.bert.pooler.x`` to ``pooler.x``.

    A tied tensor appears under each of its names in the module; one that the files hold in parts does not appear.
    """
    by_tensor = {id(named.owner): named.name for named in named_tensors(module) if named.whole}
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: by_tensor[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_tensor}


def source_names(source: TensorSource) -> dict[str, str]:
    """Canonical name to the name in the source, with everything that wrappers put into it; a part of a tensor, which
    has none there, has its name in the model's files."""
    return {named.name: named.source if named.whole else named.saved for named in named_tensors(source)}


def describe_source(source: TensorSource) -> str:
    """What a message calls a module or state dict: its folder or hub id where it has one, and its class."""
    configured = getattr(getattr(source, "config", None), "name_or_path", "")
    return f"{configured} ({type(source).__name__})" if configured else f"the target ({type(source).__name__})"


def _source_tensors(source: TensorSource) -> dict[str, Tensor]:
    """Every tensor once, under its first name in the source."""
    return _module_tensors(source) if isinstance(source, nn.Module) else _mapping_tensors(source)


def _module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A tied tensor comes under the name that it has in a mapping: as an input embedding, else its first."""
    persistent = module.state_dict(keep_vars=True).keys()
    every: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    every |= {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in every.items():
        memory = _memory_of(tensor)
        if memory not in names or embedding_rank(name) < embedding_rank(names[memory]):
            names[memory] = name
    return {name: every[name] for name in dict.fromkeys(names[_memory_of(tensor)] for tensor in every.values())}


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    """What tensors on one memory have in common; of those that do not say where they lie, themselves."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta" and tensor.numel()
    if not plain or not tensor.data_ptr():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _mapping_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tied tensor comes under its name as an input embedding, if it has one, else under its first."""
    tensors: dict[str, Tensor] = {}
    by_memory: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and tensor.device.type != "meta":
            first = by_memory.setdefault(memory, name)
            if first != name and embedding_rank(name) >= embedding_rank(first):
                continue
            tensors.pop(first, None)
            by_memory[memory] = name
        tensors[name] = tensor
    return tensors


def embedding_rank(name: str) -> int:
    """By which of a tied tensor's names it goes: 0 for an embedding that encoder and decoder share, then other input
    embeddings, then all else."""
    return next((rank for rank, word in enumerate(_EMBEDDINGS) if word in name), len(_EMBEDDINGS))


def _like_module(state: Mapping[str, Tensor], module: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A state dict's tensors under a module's names; None where it lacks some or has them in other shapes."""
    plain = {without_wrappers(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    names = {name: without_wrappers(name) for name in module}
    if any(p not in plain or plain[p].shape != module[name].shape for name, p in names.items()):
        return None
    return {name: plain[p] for name, p in names.items()}


def _of_models(
    module: nn.Module, tensors: Mapping[str, Tensor], models: Mapping[str, PreTrainedModel]
) -> list[NamedTensor]:
    """The tensors of a module that holds models of transformers: theirs as in their files, others as they are.

    Of several models, the one that is trained is meant, the others (a teacher, an average) are left out; where several
    are trained, or none, all have the names of the attributes that hold them before theirs.
    """
    meant = _meant_models(module, models)
    named: list[NamedTensor] = []
    averages = tuple(f"{path}." for path in _averages(module))
    others = {name for name in tensors if not name.startswith(averages)}
    for path, model in models.items():
        start = f"{path}." if path else ""
        sources = {without_wrappers(name[len(start) :]): name for name in tensors if name.startswith(start)}
        others -= set(sources.values())
        if path not in meant:
            continue
        for unsaved in getattr(model, "_keys_to_ignore_on_save", None) or ():  # computed, such as tables of sines
            sources.pop(unsaved, None)
        for tied, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if tied in sources and kept not in sources:
                sources[kept] = sources.pop(tied)
        own = {plain: tensors[name] for plain, name in sources.items()}
        saved = {place: name for name, place in file_layout(model, own, as_loaded=True).items()}
        before = f"{without_wrappers(path)}." if len(meant) > 1 else ""
        for name, place in file_layout(model, own).items():
            first, *more = [(tensors[sources[p.source]], p) for p in place.pieces]
            source, file_name = sources[place.source], before + saved.get(place, name)
            named.append(NamedTensor(before + name, source, file_name, *first, in_model=True, more=tuple(more)))
    named += [_as_it_is(name, tensors[name]) for name in others]
    order = {name: index for index, name in enumerate(tensors)}
    return sorted(named, key=lambda n: (order[n.source], n.place.offset))


def _meant_models(module: nn.Module, models: Mapping[str, PreTrainedModel]) -> set[str]:
    """Paths of the models whose tensors count: the only one that is trained and no average of others, else all."""
    averages = tuple(f"{path}." for path in _averages(module))
    trained = {path for path, model in models.items() if any(p.requires_grad for p in model.parameters())}
    trained -= {path for path in trained if path.startswith(averages)}
    return trained if len(trained) == 1 else set(models)


def _averages(module: nn.Module) -> list[str]:
    """Paths of torch's averaged models inside a module."""
    return [path for path, child in module.named_modules() if path and isinstance(child, AveragedModel)]


def _as_it_is(name: str, tensor: Tensor) -> NamedTensor:
    plain = without_wrappers(name)
    return NamedTensor(plain, name, plain, tensor, FilePlace(name))


def _check_parts(named: Iterable[NamedTensor]) -> None:
    """Refuse tensors in shards of which the files hold parts, since a part cannot be read in place there."""
    sharded = sorted({n.source for n in named if not n.whole and is_dtensor(n.owner)})
    if sharded:
        raise ValueError(
            f"{len(sharded)} tensors in shards stand in the model's files in other pieces, such as {sharded[0]}: prune "
            "them from the checkpoint, with dpp export and dpp prune, or on one device or under DDP"
        )


def _canonical(named: list[NamedTensor]) -> list[NamedTensor]:
    """Names in today's spelling, without shared leading parts and the base model's prefix, each given once."""
    names = [in_new_spelling(n.name) for n in named]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [n.name if name in twice else name for n, name in zip(named, names, strict=True)]
    shared = shared_parts(names)
    names = [_from(name, shared) for name in names]
    short = [without_base_prefix(name) for name in names]
    counts = Counter(short)
    return [
        replace(n, name=name if counts[stripped] > 1 else stripped)
        for n, name, stripped in zip(named, names, short, strict=True)
    ]


def in_new_spelling(name: str) -> str:
    """A name as newer files spell it: ``LayerNorm.gamma`` is ``LayerNorm.weight``, ``weight_g`` a parametrisation."""
    for old, new in _OLD_SPELLINGS:
        name = old.sub(new, name)
    return name


def shared_parts(names: Iterable[str]) -> int:
    """How many leading parts all names share, at least one part left to each, and none of those that lead to blocks."""
    split = [name.split(".") for name in names]
    count = 0
    while all(len(parts) > count + 1 and parts[count] == split[0][count] for parts in split):
        if _leads_to_blocks(split[0][count:]):
            break
        count += 1
    return count


def _leads_to_blocks(parts: list[str]) -> bool:
    """Whether the parts begin with numbered blocks: ``layers.0.…``, ``encoder.layers.0.…``."""
    parts = parts[1:] if parts[0] in _PATH_TO_BLOCKS else parts
    return len(parts) > 1 and parts[1].isdigit() and _NUMBERED.fullmatch(parts[0]) is not None


def _from(name: str, parts: int) -> str:
    return name.split(".", parts)[-1] if parts else name


def without_base_prefix(name: str) -> str:
    head, _, rest = name.partition(".")
    return rest if rest and head in BASE_MODEL_PREFIXES else name


def check_prunable(tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor has a delta in floating point.

    Raises:
        ValueError: a parameter is quantised, integer or complex, or a tensor is on the meta device, sparse or a shard
            of FSDP1; the message gives the first names and the reason for each.
    """
    check_not_quantised(tensors)
    faults = []
    for name, tensor in tensors.items():
        if tensor.is_meta:
            faults.append(f"{name}: on the meta device (no values); materialise the model first")
        elif isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
            faults.append(f"{name}: dtype {tensor.dtype}; integer or complex weights have no delta here")
        elif tensor.layout != torch.strided:
            faults.append(f"{name}: layout {tensor.layout}; expected a dense tensor")
        elif has_unsupported_placements(tensor):
            faults.append(f"{name}: placements {tensor.placements}; expected shards and replicas")  # type: ignore[attr-defined]
        elif is_fsdp1_shard(tensor):
            faults.append(f"{name}: flattened by FSDP1; take FSDP2Strategy (--config fsdp.yaml), DDP or one device")
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"{len(faults)} tensors cannot be pruned: {'; '.join(faults[:_SHOWN])}{more}")
