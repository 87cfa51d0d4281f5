"""The fine-tuned weights as a model's own files would hold them, whatever they were saved by.

A folder that ``save_pretrained`` wrote is in that form already; one with the state dict of the model, as
``torch.save`` or Accelerate's ``save_model`` writes it, has the names that tensors have in memory. So has a trainer's
checkpoint, behind the parts of what held the model (``model.``), perhaps beside a second copy of it (an average, a
teacher). Where nothing beside the weights tells what the model is, the base's configuration does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpp_lightning.pruning.adapter_check import check_merged
from dpp_lightning.storage.checkpoints import has_hf_names, load_tensors
from dpp_lightning.storage.model_configuration import CONFIG
from dpp_lightning.storage.model_folder import side_files
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.name_matching import SeveralModelsError, match_names
from dpp_lightning.tensors.names import in_new_spelling, named_tensors, without_wrappers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dpp_lightning.tensors.hf_architecture import Architecture


@dataclass(frozen=True)
class FinetunedSource:
    """Fine-tuned weights.

    Attributes:
        tensors: name to tensor.
        exact: the names are those of the model's own files, to the letter.
        files: what belongs beside them and is not among the source's own files: the configuration of a model whose
            class or sizes are not the base's.
    """

    tensors: dict[str, Tensor]
    exact: bool
    files: Mapping[str, bytes] = field(default_factory=dict)


def read_finetuned(
    source: str | Path,
    revision: str | None = None,
    *,
    base: str | Path | None = None,
    base_revision: str | None = None,
    prefix: str | None = None,
) -> FinetunedSource:
    """Fine-tuned weights from a folder, a file or a trainer's checkpoint; mapped, not read.

    Args:
        source, revision: as for :func:`dpp_lightning.storage.checkpoints.load_tensors`.
        base, base_revision: folder or hub id of the base, whose configuration says what a checkpoint's tensors are, and
            those of a folder that has none of its own and not the names of the base.
        prefix: what stands before the names of the model that is meant, such as ``student.``, where the source holds
            several; the tensors of the others are left out.

    Raises:
        SeveralModelsError: a checkpoint that holds more than one copy of the model, and no ``prefix``.
        ValueError: no tensor under the prefix, or adapters that are not merged.
        FileNotFoundError: as :func:`dpp_lightning.storage.checkpoints.load_tensors`.
    """
    check_model(source, "finetuned", revision)
    tensors, in_base = load_tensors(source, revision), {} if base is None else load_tensors(base, base_revision)
    if base is not None:
        check_merged(tensors, in_base, str(source))
    if prefix:
        tensors = _under(tensors, prefix, str(source))
    as_it_is = FinetunedSource(tensors, exact=has_hf_names(source))
    if base is None or (as_it_is.exact and _in_common(tensors, in_base)[1]):
        return as_it_is
    own = _configuration(source, revision) if as_it_is.exact else None
    config = own or _configuration(base, base_revision)
    try:
        read = None if config is None else _as_files(tensors, config, chosen=bool(prefix))
    except SeveralModelsError:
        if not as_it_is.exact:
            raise
        read = None
    if read is None:
        return as_it_is
    spelling = {in_new_spelling(name): name for name in in_base}
    spelled = {spelling.get(name, name): tensor for name, tensor in read.tensors.items()}
    if as_it_is.exact and _in_common(spelled, in_base)[0] <= _in_common(tensors, in_base)[0]:
        return as_it_is
    return replace(read, tensors=spelled, files={} if own else read.files)


def _in_common(finetuned: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> tuple[int, bool]:
    """How many tensors two models have in common by their names, and whether these are all of one of them."""
    names = [[named.name for named in named_tensors(source)] for source in (finetuned, base)]
    try:
        matched = len(match_names(*names))
    except SeveralModelsError:  # one may be any of several
        matched = 0
    return matched, matched == min(map(len, names))


def _under(tensors: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Tensor]:
    start = prefix if prefix.endswith(".") else f"{prefix}."
    chosen = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    if not chosen:
        first = ", ".join(sorted({f"{name.partition('.')[0]}." for name in tensors})[:8])
        raise ValueError(f"{source} has no tensor under the prefix {start!r}; its names begin with {first}")
    return chosen


def _configuration(source: str | Path, revision: str | None) -> PretrainedConfig | None:
    """A model's configuration; None where it has none that transformers knows."""
    path = side_files(source, revision).get(CONFIG)
    if path is None:
        return None
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # of no model that transformers has
        return None
    return config


def _as_files(tensors: Mapping[str, Tensor], config: PretrainedConfig, *, chosen: bool) -> FinetunedSource | None:
    """Tensors that are named as in memory as the model's files hold them; None if they are of no class of transformers.

    Tensors of the checkpoint that are not the model's, such as a head of the user's own, keep their names.
    """
    from dpp_lightning.tensors.hf_architecture import find_architecture
    from dpp_lightning.tensors.hf_layout import file_tensors

    plain = {without_wrappers(name): tensor for name, tensor in tensors.items()}
    try:
        found = find_architecture(
            config, {name: tuple(t.shape) for name, t in plain.items()}, prefix="" if chosen else None
        )
    except SeveralModelsError:
        raise
    except ValueError:
        return None
    untied = [t for t, s in found.tied.items() if {t, s} <= found.names.keys() and not _equal(found, plain, t, s)]
    second = {found.tied[name]: key for name, key in found.names.items() if name in found.tied}
    names = {**second, **{n: key for n, key in found.names.items() if n not in found.tied or n in untied}}
    converted = file_tensors(found.model, {name: plain[key] for name, key in names.items()})
    used = {*found.names.values(), *found.computed}
    others = {name: t for name, t in plain.items() if name not in used and name not in converted}
    return FinetunedSource({**converted, **others}, exact=True, files=_changed_config(found, config, untied))


def _equal(found: Architecture, tensors: Mapping[str, Tensor], a: str, b: str) -> bool:
    """Whether two tensors that the class ties have one value."""
    first, second = tensors[found.names[a]], tensors[found.names[b]]
    return first.shape == second.shape and torch.equal(first, second)


def _changed_config(found: Architecture, config: PretrainedConfig, untied: list[str]) -> dict[str, bytes]:
    """The configuration, where the model is of another class or size than the base says, or not tied."""
    architectures = list(config.architectures or ())
    sizes: Any = [(c.num_labels, getattr(c.get_text_config(), "vocab_size", None)) for c in (config, found.config)]
    if found.name in architectures and sizes[0] == sizes[1] and not untied:
        return {}
    if untied:
        for section in (found.config, found.config.get_text_config()):
            section.tie_word_embeddings = False
    content = json.loads(found.config.to_json_string(use_diff=True)) | {"architectures": [found.name]}
    return {CONFIG: (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()}
