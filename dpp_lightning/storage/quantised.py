"""Quantised checkpoints: refused by what their tensors are and what their configuration says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpp_lightning.storage.model_configuration import CONFIG
from dpp_lightning.tensors.quantised import StoredForm, check_not_quantised

_SECTIONS = ("quantization_config", "compression_config")


def check_plain_weights(tensors: Mapping[str, StoredForm], source: str | Path, folder: Path | None = None) -> None:
    """Refuse quantised weights on disk, of which nothing is read. The tensors decide; a configuration alone is a note.

    Args:
        tensors: name to tensor, as the files have them.
        source: what the user gave, for the message.
        folder: where ``config.json`` is, if it is anywhere.

    Raises:
        ValueError: one line with the source, the schemes, the number of tensors, the first names and the cure.
    """
    scheme = declared_scheme(folder / CONFIG) if folder is not None else None
    check_not_quantised(tensors, str(source), declared=scheme)
    if scheme is not None:
        warnings.warn(
            f"{source}: config.json has a quantization_config ({scheme}), but none of its {len(tensors)} tensors is "
            "quantised: they are taken as they are. Remove the entry, which makes from_pretrained expect other tensors",
            stacklevel=3,
        )


def refuse_gguf(files: Iterable[str], source: str) -> None:
    """Refuse weights in GGUF, llama.cpp's format, which are quantised in most files and named otherwise in all.

    Args:
        files: names of the files that are there.
        source: what holds them, for the message.

    Raises:
        ValueError: one of them is such a file; with the cure.
    """
    names = sorted(name for name in files if name.lower().endswith(".gguf"))
    if names:
        raise ValueError(
            f"{source} is GGUF, weights for llama.cpp and mostly quantised: take the model that it was made from, or "
            f"read it with transformers, from_pretrained(FOLDER, gguf_file={names[0]!r}), and save_pretrained(FOLDER)"
        )


def declared_scheme(config: Path) -> str | None:
    """What a ``config.json`` calls the scheme that the weights beside it are quantised in; None where it names none.

    A file that cannot be read names none here: it is for those to refuse who need it.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, Mapping):
        return None
    parts = [content, *(part for part in content.values() if isinstance(part, Mapping))]
    sections = [part[name] for part in parts for name in _SECTIONS if isinstance(part.get(name), Mapping)]
    return _scheme(sections[0]) if sections else None


def _scheme(section: Mapping[str, Any]) -> str:
    method = section.get("quant_method") or section.get("quant_algo")
    if method is None:
        method = "bitsandbytes" if any(key.startswith("load_in_") for key in section) else "unnamed"
    bits = section.get("bits", section.get("w_bit"))
    return f"{method}, {bits} bits" if isinstance(bits, int) else str(method)
