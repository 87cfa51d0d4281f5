"""What ``dpp export`` is to write: a checkpoint laid over a transformers model, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from dpp_lightning.export.lora_merge import Adapter, split_adapters
from dpp_lightning.export.write import Export
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.mapped_file import load_outline
from dpp_lightning.storage.model_folder import side_files
from dpp_lightning.storage.quantised import check_plain_weights
from dpp_lightning.storage.sharded_checkpoint import is_sharded, read_sharded
from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.dtypes import FLOATS
from dpp_lightning.tensors.hf_architecture import Architecture, find_architecture
from dpp_lightning.tensors.hf_layout import file_layout

_LIGHTNING_FILE = "meta.pt"  # of a sharded checkpoint: all but the tensors


def read_checkpoint(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any], list[str]]:
    """Tensors and hyper-parameters of a ``.ckpt``, ``.pt`` or ``.safetensors`` file or of a sharded folder.

    Returns:
        (name to tensor, hyper-parameters, notes for the user). No weights are read yet.

    Raises:
        FileNotFoundError: no such checkpoint, or files of it are missing.
        ValueError: a damaged one, or one with more than tensors and plain values in it.
    """
    if is_sharded(path):
        tensors, extra = read_sharded(path), path / _LIGHTNING_FILE
        check_plain_weights(tensors, path)
    elif path.is_file():
        tensors, extra = {name: StoredTensor.of(tensor) for name, tensor in load_tensors(path).items()}, path
    elif path.is_dir():
        files = ", ".join(sorted(p.name for p in path.iterdir())[:8])
        raise FileNotFoundError(
            f"{path}: expected a .ckpt file or a sharded folder (.metadata and *.distcp files); this folder holds "
            f"{files or 'nothing'}. Name the checkpoint itself; DeepSpeed's are converted by its zero_to_fp32.py first"
        )
    else:
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a .ckpt file or a sharded folder")
    if not extra.is_file() or extra.suffix == ".safetensors":
        return tensors, {}, []
    try:
        content = load_outline(extra)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file ends in almost any type
        reason = str(error).splitlines()[0]
        return tensors, {}, [f"{extra.name} cannot be read without running code, its settings are not used: {reason}"]
    settings = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    return tensors, dict(settings) if isinstance(settings, Mapping) else {}, []


def plan_export(
    checkpoint: str | Path,
    *,
    config_from: str | None = None,
    config_revision: str | None = None,
    architecture: str | None = None,
    prefix: str | None = None,
    dtype: str | None = None,
) -> Export:
    """Read what a checkpoint holds and lay it over a transformers model; no weights are read.

    Args:
        checkpoint: as :func:`read_checkpoint` takes it.
        config_from: folder or hub id with the configuration and tokenizer of the model that was trained; by default
            the checkpoint's hyper-parameter ``pretrained``.
        config_revision: branch, tag or commit of a hub id.
        architecture: class of transformers; by default the one whose tensors these are.
        prefix: what stands before the model's names, such as ``model.``; by default the one of most tensors.
        dtype: of the floating-point weights; by default as in the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint, files of it or the configuration are not there.
        ValueError: tensors that are missing or do not fit, adapters that cannot be merged, or no configuration.
    """
    stored, settings, notes = read_checkpoint(Path(checkpoint))
    source, revision = _source(config_from, config_revision, settings)
    files, config = _configuration(source, revision)
    plain, adapters = split_adapters(stored, settings)
    matched, names = _match(config, plain, adapters, notes, architecture=architecture, prefix=prefix)
    tensors = {name: plain[key] for name, key in names.items()}
    merged = {name: adapters[key] for name, key in names.items() if key in adapters}
    if lost := sorted(set(adapters) - {names[name] for name in merged}):
        raise ValueError(
            f"the checkpoint holds adapters of {', '.join(lost[:5])}, but no such weights of {matched.name}"
        )
    cast = FLOATS[dtype] if dtype else None
    _set_dtype(matched.config, tensors, cast)
    state = matched.model.state_dict()
    layout = file_layout(matched.model, {name: state[name] for name in tensors})
    notes += _notes(matched, config, plain, source, len(merged))
    return Export(matched, tensors, layout, merged, cast, Path(checkpoint), source, files, tuple(notes))


def _source(given: str | None, revision: str | None, settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where configuration and tokenizer come from."""
    if given is not None:
        return given, revision
    pretrained = settings.get("pretrained")
    if isinstance(pretrained, str):
        trained_revision = settings.get("revision")
        return pretrained, revision or (trained_revision if isinstance(trained_revision, str) else None)
    raise ValueError(
        "the checkpoint does not name the model that was trained (hyper-parameter pretrained): give its folder or hub "
        "id with --config_from"
    )


def _configuration(source: str, revision: str | None) -> tuple[dict[str, Path], PretrainedConfig]:
    cure = "give the folder or hub id of the model that was trained with --config_from"
    try:
        files = side_files(source, revision)
        if "config.json" not in files:
            raise ValueError(f"{source} has no config.json")
        return files, AutoConfig.from_pretrained(files["config.json"].parent, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no configuration of a transformers model from {source}: {error}; {cure}") from error


def _match(
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
    adapters: Mapping[str, Adapter],
    notes: list[str],
    **chosen: str | None,
) -> tuple[Architecture, dict[str, str]]:
    """The class, and the model's name of each tensor to the checkpoint's, each tied one once."""
    shapes, untied_config = {name: tensor.shape for name, tensor in stored.items()}, deepcopy(config)
    matched = find_architecture(config, shapes, **chosen)
    untied = _untied_in_checkpoint(matched, stored, adapters)
    if untied and matched.config.tie_word_embeddings:
        for section in (untied_config, untied_config.get_text_config()):
            section.tie_word_embeddings = False
        notes.append(f"tie_word_embeddings is false: {', '.join(untied)} in the checkpoint has values of its own")
        matched = find_architecture(untied_config, shapes, **chosen)
        untied = _untied_in_checkpoint(matched, stored, adapters)
    if untied:
        raise ValueError(f"{matched.name} ties {', '.join(untied)}, which in the checkpoint has values of its own")
    names = {name: key for name, key in matched.names.items() if name not in matched.tied}
    # a tied tensor that the checkpoint holds under its second name alone
    second_names = {matched.tied[name]: key for name, key in matched.names.items() if name in matched.tied}
    return matched, {**second_names, **names}


def _untied_in_checkpoint(
    matched: Architecture, stored: Mapping[str, StoredTensor], adapters: Mapping[str, Adapter]
) -> list[str]:
    """Tensors that the class ties, and that have different values in the checkpoint."""
    names = matched.names
    both = [(t, names[t], names[source]) for t, source in matched.tied.items() if {t, source} <= names.keys()]
    return [t for t, a, b in both if a in adapters or b in adapters or not stored[a].same(stored[b])]


def _set_dtype(config: PretrainedConfig, tensors: Mapping[str, StoredTensor], cast: torch.dtype | None) -> None:
    """What the configuration says of the dtype: that of most of the weights. Configurations inside it (of vision, of
    audio) that said the same follow."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[cast or tensor.dtype] += tensor.numel
    if sizes:
        named, parts = config.dtype, [getattr(config, name, None) for name in config.sub_configs]
        follow = [part for part in parts if isinstance(part, PretrainedConfig) and part.dtype == named]
        for section in (config, config.get_text_config(), *follow):
            section.dtype = sizes.most_common(1)[0][0]


def _notes(
    matched: Architecture, config: PretrainedConfig, stored: Mapping[str, StoredTensor], source: str, merged: int
) -> Iterator[str]:
    if merged:
        yield f"{merged} LoRA adapters merged into their weights"
    if matched.config.num_labels != config.num_labels:
        yield f"num_labels is {matched.config.num_labels}, as the head has it ({config.num_labels} in {source})"
    rows, before = (getattr(c.get_text_config(), "vocab_size", None) for c in (matched.config, config))
    if rows != before:
        yield f"vocab_size is {rows} ({before} in {source}, whose tokenizer files are written)"
    if matched.left_out:
        size, more = sum(stored[name].nbytes for name in matched.left_out), len(matched.left_out) - 8
        names = ", ".join(matched.left_out[:8]) + (f" and {more} more" if more > 0 else "")
        yield f"left out, {size:,} bytes that are not of {matched.name}: {names}"
