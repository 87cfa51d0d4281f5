"""Which transformers model a checkpoint's tensors are: its class, its configuration, and the name of every tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

Shape = tuple[int, ...]

_KINDS = (  # the most frequent first: among classes of the same tensors the first is taken
    "SEQUENCE_CLASSIFICATION", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIPLE_CHOICE",
)  # fmt: skip
_COMPUTED = (r"\.position_ids$", r"\.rotary_emb\.inv_freq$", r"\.masked_bias$")  # buffers of older versions
_SHOWN = 10


@dataclass
class Architecture:
    """A class of transformers laid over the names of a checkpoint.

    Attributes:
        name: of the class.
        model: the model with the sizes of the checkpoint, on the meta device.
        prefix: what stands before the model's own names in the checkpoint, such as ``model.``.
        names: the model's own name of each tensor that was found, in the model's order, to the checkpoint's name.
        tied: own name to that of the tensor it is tied to.
        transposed: own names of the weights that lie as (inputs, outputs).
        left_out: names in the checkpoint that are not the model's.
        missing, misfits, unexpected: faults, each a name or a line with a name.
        rivals: other prefixes under which there is as much of the model.
    """

    name: str
    model: PreTrainedModel
    prefix: str = ""
    names: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    left_out: list[str] = field(default_factory=list)
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
    """The class that has the most of a checkpoint's tensors, and all of its own there.

    Args:
        config: of the base; labels and vocabulary may have other sizes than in the checkpoint. Not changed.
        shapes: the checkpoint's names, without the parts of wrappers and adapters, and shapes.
        architecture: the class, where it is known.
        prefix: what stands before the model's own names, where it is known.

    Raises:
        ValueError: no such class, more than one model, or tensors that are missing, unexpected or of another shape: all
            in one message.
    """
    best: Architecture | None = None
    prefix = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    for name in [architecture] if architecture else _candidates(config):
        found = _laid_over(name, config, shapes, prefix, asked=architecture is not None)
        if found and (best is None or _order(found) > _order(best)):
            best = found
            if len(best.names) == len(shapes) and not best.missing:
                break
    if best is None:
        raise ValueError(f"transformers has no class to build for the model type {config.model_type!r}")
    if best.rivals:
        raise ValueError(
            f"the checkpoint holds more than one {best.name}: choose with --prefix one of "
            f"{', '.join(map(repr, [best.prefix, *best.rivals]))}"
        )
    _check(best)
    return best


def _order(found: Architecture) -> tuple[int, int]:
    return len(found.names), -len(found.missing)


def _candidates(config: PretrainedConfig) -> Iterator[str]:
    """Classes of this model type, those that the configuration names first, the bare model last."""
    names = list(config.architectures or ())
    for kind in (*(f"MODEL_FOR_{kind}" for kind in _KINDS), "MODEL"):
        found = getattr(modeling_auto, f"{kind}_MAPPING_NAMES", {}).get(config.model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    yield from dict.fromkeys(names)


def _laid_over(
    name: str, config: PretrainedConfig, shapes: Mapping[str, Shape], prefix: str | None, *, asked: bool
) -> Architecture | None:
    """The class over the checkpoint, with sizes made to fit; None for one that cannot be built."""
    model = _skeleton(name, config, asked=asked)
    if model is None:
        return None
    found = _named(model, name, shapes, prefix)
    resized = _resized(model, found, shapes)
    if resized is not None:
        model = _skeleton(name, resized, asked=asked) or model
    found.model = model
    model.config.architectures = [name]
    for own, parameter in model.state_dict().items():
        here = shapes.get(found.names.get(own, ""))
        if here is not None and here != tuple(parameter.shape):
            found.misfits.append(f"{own} is {here}, the configuration says {tuple(parameter.shape)}")
    return found


def _skeleton(name: str, config: PretrainedConfig, *, asked: bool) -> PreTrainedModel | None:
    """The model without values."""
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


def _named(model: PreTrainedModel, name: str, shapes: Mapping[str, Shape], prefix: str | None) -> Architecture:
    """Each of the model's tensors with its name in the checkpoint."""
    state = model.state_dict()
    votes: Counter[str] = Counter()
    for other in shapes:
        parts = other.split(".")
        starts = (".".join(parts[i:]) for i in range(len(parts)))
        votes.update(other[: len(other) - len(own)] for own in starts if own in state)
    most = votes.most_common()
    chosen = prefix if prefix is not None else most[0][0] if most else ""
    rivals = [p for p, count in most if p != chosen and count == votes[chosen]] if prefix is None else []
    names = {own: chosen + own for own in state if chosen + own in shapes}
    tied = {t: s for t, s in getattr(model, "all_tied_weights_keys", {}).items() if t in state and s in state}
    needed = [own for own in state if own not in names and not _ignored(own, model._keys_to_ignore_on_load_missing)]
    reverse = {source: target for target, source in tied.items() if target in names}
    missing = [own for own in needed if tied.get(own) not in names and own not in reverse]
    used, tops = set(names.values()), {own.partition(".")[0] for own in state}
    rest = [other for other in shapes if other not in used]
    own_rest = [r for r in rest if r.startswith(chosen) and (chosen or r.partition(".")[0] in tops)]
    patterns = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    unexpected = [r for r in own_rest if not _ignored(r.removeprefix(chosen), patterns)]
    transposed = frozenset(f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D))
    left_out = [r for r in rest if r not in unexpected]
    return Architecture(
        name, model, chosen, names, tied, transposed, left_out, missing, [], unexpected, rivals
    )  # fmt: skip


def _ignored(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _resized(model: PreTrainedModel, found: Architecture, shapes: Mapping[str, Shape]) -> PretrainedConfig | None:
    """The configuration with the checkpoint's number of labels and size of vocabulary; None if both fit."""
    config = deepcopy(model.config)
    text, state, changed = config.get_text_config(), model.state_dict(), False
    for own, other in found.names.items():
        expected, here = tuple(state[own].shape), shapes[other]
        if here == expected or not here or here[1:] != expected[1:]:
            continue
        if expected[0] == getattr(text, "vocab_size", None):
            text.vocab_size, changed = here[0], True
        elif expected[0] == config.num_labels:
            config.num_labels, changed = here[0], True
    return config if changed else None


def _check(found: Architecture) -> None:
    place = f" (under {found.prefix!r})" if found.prefix else ""
    faults = {"missing": found.missing, "of another shape": found.misfits, "unexpected": found.unexpected}
    lines = [f"{what}: {_few(names)}" for what, names in faults.items() if names]
    if lines and not found.names:
        lines = [f"none of {found.name} is there; the checkpoint has {_few(found.left_out)}"]
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"the checkpoint's tensors are not those of {found.name}{place}; is the configuration that of the model it "
            f"was trained from? --config-from and --architecture say so\n  {listed}"
        )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more
