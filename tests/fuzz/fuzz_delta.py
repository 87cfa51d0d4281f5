"""Fuzz target: the delta reader, behind checksums that are made right again."""

import json
import sys
from functools import partial
from pathlib import Path

from harness import fuzz, instrumented, pack, unpack

with instrumented():
    from hostile import KINDS, blob, files, outcome, packed, repaired, table_of

    from dpp_lightning import SparseDelta

from safetensors import SafetensorError
from safetensors.torch import load, save

PARTS = 5  # config, table as JSON, chunks of kept entries, chunks of factors, safetensors file of the dense tensors
_BLOBS = ("table", "kept", "factors")
_GOLDEN = sorted((Path(__file__).parents[1] / "fixtures").glob("delta_v3_*"))


def seeds() -> list[bytes]:
    """The golden files, and small deltas of every kind."""
    golden = [
        tuple((folder / f"delta_{name}").read_bytes() for name in ("model.safetensors", "config.json"))
        for folder in _GOLDEN
    ]
    return [input_of(model, config) for model, config in (*golden, *(files(kind) for kind in KINDS))]


def input_of(model: bytes, config: bytes) -> bytes:
    """The input that a delta's two files come from."""
    tensors = load(model)
    dense = {name: tensor for name, tensor in tensors.items() if name not in _BLOBS}
    kept, factors = (bytes(tensors[name].numpy()) if name in tensors else b"" for name in ("kept", "factors"))
    return pack([config, json.dumps(table_of(model)).encode(), kept, factors, save(dense)])


def target(data: bytes) -> None:
    """Read the delta of an input: a ValueError with a message, or a valid delta that comes back when written."""
    outcome(partial(SparseDelta.from_bytes, *files_of(*unpack(data, PARTS))))


def files_of(config: bytes, table: bytes, kept: bytes, factors: bytes, dense: bytes) -> tuple[bytes, bytes]:
    """The two files; where the dense tensors are no safetensors file they are the whole of the model file."""
    model = dense
    try:
        tensors = load(dense)
        blobs = {"table": packed(table), "kept": blob(kept)} | ({"factors": blob(factors)} if factors else {})
        model = save({**tensors, **blobs})
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError):
        pass
    try:
        parsed = json.loads(config)
    except (ValueError, RecursionError):
        return model, config
    return repaired(model, parsed) if isinstance(parsed, dict) else (model, config)


if __name__ == "__main__":
    fuzz(target, seeds(), PARTS, sys.argv[1:])
