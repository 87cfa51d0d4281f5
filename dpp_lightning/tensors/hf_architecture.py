"""Which transformers model a checkpoint's tensors are: its class, its configuration, and the name of every tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from dpp_lightning.tensors.name_matching import SeveralModelsError

Shape = tuple[int, ...]

_KINDS = (  # the most frequent first: among classes of the same tensors the first is taken
    "SEQUENCE_CLASSIFICATION", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIPLE_CHOICE",
)  # fmt: skip
_COMPUTED = (r"\.position_ids$", r"\.rotary_emb\.inv_freq$", r"\.masked_bias$")  # buffers of older versions
_SHOWN = 4


@dataclass
class Architecture:
    """A class of transformers laid over the names of a checkpoint.

    Attributes:
        name: of the class.
        model: the model with the sizes of the checkpoint, on the meta device.
        prefix: what stands before the model's own names in the checkpoint, such as ``model.``.
        names: the model's name of each tensor that the checkpoint has, in the model's order, to the checkpoint's name.
        tied: the model's name of a tensor to that of the one it is tied to.
        transposed: the model's names of the weights that lie as (inputs, outputs).
        left_out: names in the checkpoint that are not the model's, or that no file of it has.
        computed: those of them that the model has, and computes.
        missing, misfits, unexpected: faults, each a name or a line with a name.
        rivals: further prefixes under which there is as much of the model.
    """

    name: str
    model: PreTrainedModel
    prefix: str = ""
    names: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    left_out: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    rivals: list[str] = field(default_factory=list)

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.model.config


def find_architecture(
    config: PretrainedConfig,
    shapes: Mapping[str, Shape],
    *,
    architecture: str | None = None,
    prefix: str | None = None,
) -> Architecture:
    """The class of transformers that has the most of a checkpoint's tensors, with every tensor of the class there.

    Args:
        config: of the base; labels and vocabulary may have other sizes than in the checkpoint. Not changed.
        shapes: the checkpoint's names, without what wrappers and adapters put into them, to shapes.
        architecture: the class, where it is known.
        prefix: what stands before the model's own names, where it is known.

    Raises:
        SeveralModelsError: more than one model.
        ValueError: no such class, or tensors that are missing, unexpected or of another shape: all in one message.
    """
    best: Architecture | None = None
    prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    for name in [architecture] if architecture else _candidates(config):
        candidate = _lay_over(name, config, shapes, prefix, asked=architecture is not None)
        if candidate and (best is None or _rank(candidate) > _rank(best)):
            best = candidate
            if len(best.names) == len(shapes) and not best.missing:
                break
    if best is None:
        raise ValueError(f"transformers has no class to build for the model type {config.model_type!r}")
    if best.rivals:
        raise SeveralModelsError(
            f"the checkpoint holds more than one {best.name}: choose with --prefix one of "
            f"{', '.join(map(repr, [best.prefix, *best.rivals]))}"
        )
    _check(best)
    return best


def _rank(candidate: Architecture) -> tuple[int, int]:
    """By how much of the checkpoint it explains, then by how little it lacks."""
    return len(candidate.names), -len(candidate.missing)


def _candidates(config: PretrainedConfig) -> Iterator[str]:
    """Classes of this model type, those that the configuration names first, the bare model last."""
    names = list(config.architectures or ())
    for kind in (*(f"MODEL_FOR_{kind}" for kind in _KINDS), "MODEL"):
        classes = getattr(modeling_auto, f"{kind}_MAPPING_NAMES", {}).get(config.model_type, ())
        names += [classes] if isinstance(classes, str) else list(classes)
    yield from dict.fromkeys(names)


def _lay_over(
    name: str, config: PretrainedConfig, shapes: Mapping[str, Shape], prefix: str | None, *, asked: bool
) -> Architecture | None:
    """The class over the checkpoint, with sizes made to fit; None for one that cannot be built."""
    model = skeleton(name, config, asked=asked)
    if model is None:
        return None
    candidate = _match_names(model, name, shapes, prefix)
    resized = _resized(model, candidate, shapes)
    if resized is not None:
        model = skeleton(name, resized, asked=asked) or model
    candidate.model = model
    model.config.architectures = [name]
    for tensor_name, parameter in model.state_dict().items():
        shape = shapes.get(candidate.names.get(tensor_name, ""))
        if shape is not None and shape != tuple(parameter.shape):
            candidate.misfits.append(f"{tensor_name} is {shape}, the configuration says {tuple(parameter.shape)}")
    return candidate


def skeleton(name: str, config: PretrainedConfig, *, asked: bool = False) -> PreTrainedModel | None:
    """A model without values.

    Args:
        name: class of transformers.
        config: not changed.
        asked: the user named the class.

    Returns:
        The model on the meta device; None where the class cannot be built.

    Raises:
        ValueError: it cannot be built, and ``asked`` is true.
    """
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        if asked:
            raise ValueError(f"--architecture {name}: transformers {transformers.__version__} has no such model class")
        return None
    try:
        with torch.device("meta"):
            return kind(deepcopy(config))
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        if asked:
            raise ValueError(f"--architecture {name} cannot be built from this configuration: {error}") from error
        return None


def _match_names(model: PreTrainedModel, name: str, shapes: Mapping[str, Shape], prefix: str | None) -> Architecture:
    """Each of the model's tensors with its name in the checkpoint, which may hold further models beside it."""
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # computed, such as tables of sines
    state = {tensor: value for tensor, value in model.state_dict().items() if tensor not in unsaved}
    chosen, rivals = _choose_prefix(state, shapes) if prefix is None else (prefix, [])
    names = {tensor: chosen + tensor for tensor in state if chosen + tensor in shapes}
    tied = {t: s for t, s in getattr(model, "all_tied_weights_keys", {}).items() if t in state and s in state}
    stored_under_target = {source for target, source in tied.items() if target in names}
    missing = [
        tensor
        for tensor in state
        if tensor not in names
        and not _ignored(tensor, model._keys_to_ignore_on_load_missing)
        and tied.get(tensor) not in names
        and tensor not in stored_under_target
    ]
    used, modules = set(names.values()), {tensor.partition(".")[0] for tensor in state}
    rest = [key for key in shapes if key not in used]
    of_this_model = [k for k in rest if k.startswith(chosen) and (chosen or k.partition(".")[0] in modules)]
    computed = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    own_names = {key: key.removeprefix(chosen) for key in of_this_model}
    unexpected = [k for k, own in own_names.items() if own not in unsaved and not _ignored(own, computed)]
    return Architecture(
        name,
        model,
        chosen,
        names,
        tied,
        transposed=frozenset(f"{n}.weight" for n, module in model.named_modules() if isinstance(module, Conv1D)),
        left_out=[key for key in rest if key not in unexpected],
        computed=[key for key in of_this_model if key not in unexpected],
        missing=missing,
        unexpected=unexpected,
        rivals=rivals,
    )


def _choose_prefix(state: Collection[str], shapes: Mapping[str, Shape]) -> tuple[str, list[str]]:
    """What stands before the most of a model's names in a checkpoint, and further prefixes before as many."""
    votes: Counter[str] = Counter()
    for key in shapes:
        parts = key.split(".")
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        votes.update(key.removesuffix(end) for end in ends if end in state)
    ranked = votes.most_common()
    if not ranked:
        return "", []
    chosen, most = ranked[0]
    return chosen, [prefix for prefix, count in ranked[1:] if count == most]


def _ignored(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _resized(model: PreTrainedModel, candidate: Architecture, shapes: Mapping[str, Shape]) -> PretrainedConfig | None:
    """The configuration with the checkpoint's number of labels and size of vocabulary; None if both fit."""
    config = deepcopy(model.config)
    text, state, changed = config.get_text_config(), model.state_dict(), False
    for name, key in candidate.names.items():
        expected, shape = tuple(state[name].shape), shapes[key]
        if shape == expected or not shape or shape[1:] != expected[1:]:
            continue
        if expected[0] == getattr(text, "vocab_size", None):
            text.vocab_size, changed = shape[0], True
        elif expected[0] == config.num_labels:
            config.num_labels, changed = shape[0], True
    return config if changed else None


def _check(best: Architecture) -> None:
    under = f" (under {best.prefix!r})" if best.prefix else ""
    faults = {"missing": best.missing, "of another shape": best.misfits, "unexpected": best.unexpected}
    lines = [f"{fault} {_few(names)}" for fault, names in faults.items() if names]
    if lines and not best.names:
        lines = [f"none of {best.name} is there; the checkpoint has {_few(best.left_out)}"]
    if lines:
        raise ValueError(
            f"the checkpoint's tensors are not those of {best.name}{under}: {', '.join(lines)}. Is the configuration "
            "that of the model it was trained from? --config_from and --architecture say so; of a timm model dpp prune "
            "BASE CHECKPOINT makes the delta"
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more
