"""Tied tensors that a folder stores twice, such as an embedding and the head that is tied to it, found by content.

A model with tied embeddings has one tensor; a file may hold it under both names. Pruned as two tensors they would get
two masks, and the model would no longer be tied. What the configuration ties, and the values confirm, is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpp_lightning.storage.file_content import read_json_object
from dpp_lightning.tensors.names import embedding_rank

_PROBE = 4096  # entries compared before whole tensors are


def share_tied(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, those that are tied sharing one storage as in a PyTorch file.

    Args:
        tensors: name to tensor.
        folder: with the model's ``config.json``; without one nothing is known to be tied.

    Returns:
        The same names in the same order.
    """
    copies = list(_copies(tensors))
    if not copies or not (folder / "config.json").is_file():
        return dict(tensors)
    tied = _tied_names(folder)
    pairs = copies if tied is None else [(a, b) for a, b in tied.items() if {a, b} <= tensors.keys()]
    shared = dict(tensors)
    for name, source in pairs:
        if _equal(tensors[name], tensors[source]):
            shared[name] = shared[source]
    return shared


def _copies(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Matrices that begin as an input embedding of their shape does, and the embedding's name."""
    last = embedding_rank("")
    matrices = {name: t for name, t in tensors.items() if t.dim() == 2 and t.numel()}
    embeddings = sorted((n for n in matrices if embedding_rank(n) < last), key=lambda n: (embedding_rank(n), n))
    taken: set[str] = set()
    for source in embeddings:
        for name, tensor in matrices.items():
            if name != source and not {name, source} & taken and _alike(tensor, matrices[source]):
                taken.add(name)
                yield name, source


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.data_ptr() == b.data_ptr():
        return False
    return torch.equal(a.reshape(-1)[:_PROBE], b.reshape(-1)[:_PROBE])


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _tied_names(folder: Path) -> dict[str, str] | None:
    """What the class that the configuration names ties: name in the files to the name it is tied to.

    None where transformers has no such class, and the configuration does not say that nothing is tied.
    """
    from transformers import AutoConfig

    from dpp_lightning.tensors.hf_architecture import skeleton
    from dpp_lightning.tensors.hf_layout import file_layout

    raw = read_json_object(folder / "config.json")
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = next(iter(filter(None, (skeleton(name, config) for name in config.architectures or ()))), None)
    except (OSError, ValueError, KeyError):
        model = None
    if model is None:
        return None if raw.get("tie_word_embeddings", True) else {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict()
    layout = file_layout(model, state)
    names = {place.source: name for name, place in layout.items() if place.size is None}
    return {names.get(name, name): names.get(source, source) for name, source in tied.items()}
