"""Fuzz target: the readers of ``model.safetensors.index.json``, beside two whole shards."""

import json
import sys
import tempfile
from pathlib import Path

from harness import fuzz, instrumented, pack, unpack

with instrumented():
    from dpp_lightning.storage.checkpoints import load_tensors
    from dpp_lightning.storage.source_kind import check_model

import torch
from safetensors.torch import save_file

PARTS = 1
_FOLDER = Path(tempfile.mkdtemp())
_SHARDS = {"1.safetensors": {"a": torch.ones(2), "b": torch.ones(3)}, "2.safetensors": {"c": torch.zeros(2, 2)}}
for _name, _tensors in _SHARDS.items():
    save_file(_tensors, _FOLDER / _name)


def seeds() -> list[bytes]:
    """The right index, with and without what else stands there, and some of other types."""
    weight_map = {name: shard for shard, tensors in _SHARDS.items() for name in tensors}
    whole = {"metadata": {"total_size": 36}, "weight_map": weight_map}
    texts = [json.dumps(content) for content in (whole, {"weight_map": weight_map}, {"weight_map": []}, [], "a")]
    return [pack([text.encode()]) for text in (*texts, json.dumps(whole, indent=2), '{"weight_map": {"a": "../1"}}')]


def target(data: bytes) -> None:
    """Read a folder by its index: a refusal, or all tensors of the shards that the index names."""
    (_FOLDER / "model.safetensors.index.json").write_bytes(*unpack(data, PARTS))
    for read in (lambda: check_model(_FOLDER), lambda: load_tensors(_FOLDER)):
        try:
            found = read()
        except (ValueError, FileNotFoundError):
            continue
        assert found is None or set(found) <= {name for tensors in _SHARDS.values() for name in tensors}


if __name__ == "__main__":
    fuzz(target, seeds(), PARTS, sys.argv[1:])
