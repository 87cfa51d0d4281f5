"""Fuzz target: the reader of ``.metadata``, the pickle that describes a sharded checkpoint."""

import pickle
import sys
import tempfile
from pathlib import Path

from harness import fuzz, instrumented, pack, unpack

with instrumented():
    from dpp_lightning.storage.checkpoint_metadata import read_metadata

import torch
import torch.distributed.checkpoint as dcp

PARTS = 1
_FOLDER = Path(tempfile.mkdtemp())


def seeds() -> list[bytes]:
    """What torch writes of a small training state, and the same in every pickle protocol."""
    state = {
        "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
    }
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        written = (Path(folder) / ".metadata").read_bytes()
    metadata = pickle.loads(written)
    return [pack([data]) for data in (written, *(pickle.dumps(metadata, protocol) for protocol in range(2, 6)))]


def target(data: bytes) -> None:
    """Read a description: a ValueError, or names, layouts and places of plain values."""
    (_FOLDER / ".metadata").write_bytes(*unpack(data, PARTS))
    try:
        names, layouts, spans = read_metadata(_FOLDER)
    except ValueError:
        return
    assert all(isinstance(name, str) and isinstance(short, str) for name, short in names.items())
    assert all(type(size) is int and size >= 0 for layout in layouts.values() for size in layout.shape)
    assert all(isinstance(name, str) and all(type(o) is int for o in offsets) for name, offsets in spans)


if __name__ == "__main__":
    fuzz(target, seeds(), PARTS, sys.argv[1:])
