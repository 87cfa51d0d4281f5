"""``.metadata`` of a sharded checkpoint: what torch writes is read, and a hostile one costs neither memory nor time."""

import pickle
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from child_limits import run_limited
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dpp_lightning.storage.checkpoint_metadata import read_metadata


def written(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)
    return folder


def described(name="w", size=(2, 3), offsets=(0, 0), sizes=(2, 3), path=("w",), storage=None):
    """A description as torch has it, with anything in its places."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))
    object.__setattr__(chunk, "offsets", offsets)
    object.__setattr__(chunk, "sizes", sizes)
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([0]), [chunk])
    tensor.size = size
    return pickle.dumps(Metadata({name: tensor}, {name: path}, storage or {}))


def nested(leaf, depth):
    """A tuple of two references to a tuple of two references ..., of which a plain walk takes 2**depth steps."""
    for _ in range(depth):
        leaf = (leaf, leaf)
    return leaf


def test_what_torch_writes_is_read(tmp_path):
    state = {
        "model": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.zeros(3, dtype=torch.bfloat16)),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
    }
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    names, layouts, spans = read_metadata(tmp_path / "dcp")
    assert names == {"model.a": "a", "model.b": "b"}
    assert (layouts["model.a"].shape, layouts["model.b"].dtype) == ((2, 3), torch.bfloat16)
    assert {key for key in spans if key[0].startswith("model")} == {("model.a", (0, 0)), ("model.b", (0,))}


def test_a_description_of_plain_values_is_read(tmp_path):
    names, layouts, _ = read_metadata(written(tmp_path, described()))
    assert names == {"w": "w"}
    assert layouts["w"].pieces == {(0, 0): (2, 3)}


HOSTILE = {
    "a memo of 2**28 places": b"\x80\x02N" + pickle.LONG_BINPUT + (1 << 28).to_bytes(4, "little") + b".",
    "a text of 2**40 letters": b"\x80\x04" + pickle.BINUNICODE8 + (1 << 40).to_bytes(8, "little") + b"a.",
    "an array of 2**40 bytes": b"\x80\x05" + pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little") + b".",
    "sizes of text": described(size=("a" * 500, 1 << 30), sizes=("a" * 500, 1 << 30)),
    "sizes that are no whole numbers": described(size=(2.0, 3), sizes=(2.0, 3)),
    "a number below 0": described(size=(-2, -3), sizes=(-2, -3)),
    "offsets that hold one another": described(offsets=nested("a", 60)),
    "a path that holds itself many times": described(path=nested("a" * 100, 60)),
    "a name in place of a size": described(size="ab", sizes="ab"),
    "a span of text": described(storage={MetadataIndex("w", torch.Size([0, 0])): "x"}),
}


def nested_key(depth):
    """The pickle of a dict whose key is such a tuple, written by hand: Python itself would hash it."""
    tuples = b"".join(pickle.BINPUT + b"\x01" + pickle.BINGET + b"\x01" + pickle.TUPLE2 for _ in range(depth))
    return b"\x80\x02}" + b")" + tuples + pickle.NONE + pickle.SETITEM + b"."


@pytest.mark.parametrize("case", [*HOSTILE, "a nested key"])
def test_a_hostile_one_is_refused_at_once(tmp_path, case):
    data = nested_key(60) if case == "a nested key" else HOSTILE[case]
    folder = written(tmp_path, data)
    kind, message = run_limited(lambda: read_metadata(folder), megabytes=200, seconds=5)
    assert kind == "ValueError", message
    assert ".metadata" in message
    assert "again" in message
    assert len(message) < 400 + len(str(folder))
