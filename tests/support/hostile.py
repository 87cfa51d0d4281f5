"""Delta files to damage, tools to repair their checksums, and what every refusal must look like."""

import json
import struct
import time
from functools import cache
from math import prod

import pytest
import torch
import zstandard
from factored import factored_pair
from safetensors.torch import load, save
from tiny import pair
from torch import nn
from xxhash import xxh3_128_hexdigest

from dpp_lightning import prune
from dpp_lightning.delta.coding.positions import GAPS
from dpp_lightning.delta.config_file import config_checksum
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.tensors.dtypes import DTYPES, INTEGERS

HEAD, STREAM = struct.Struct("<QIBBBB"), struct.Struct("<II")

KINDS = {
    "seeded": {"method": "dare", "dtype": "bfloat16"},
    "ranked": {"method": "magnitude"},
    "weighed": {"method": "importance", "dtype": "float16"},
    "integers": {"method": "magnitude", "dtype": "int4", "budget": "model"},
    "dense": {"method": "random-drop", "dtype": "int8", "pruning_rate": 0.5},
    "factors": {"method": "magnitude", "dtype": "bfloat16", "factors_dtype": "int8"},
    "factors and a drawn rest": {
        "method": "dare",
        "drawn_rate": 0.8,
        "rest": True,
        "dtype": "int2",
        "factors_dtype": "int3",
    },
    "seeded factors": {"method": "dare", "drawn_rate": 0.8, "factors_dtype": "float16"},
}


@cache
def files(kind):
    """The two files of a small delta with carried tensors, and with factors or a grown vocabulary."""
    if "factors" in kind:
        return factored_pair(**KINDS[kind])[1].to_bytes()
    base, finetuned = pair(seed=1)
    grown = nn.Embedding(40, 8)
    grown.weight.data[:37] = finetuned.embed.weight.data
    finetuned.embed = grown
    return prune(base, finetuned, **{"pruning_rate": 0.9, "seed": 4, "carry": ["head.*"], **KINDS[kind]}).to_bytes()


def repaired(model, config):
    """Both checksums made right again, so that what lies behind them is reached."""
    config = {**config, "model_checksum": xxh3_128_hexdigest(model)}
    return model, json.dumps({**config, "config_checksum": config_checksum(config)}).encode()


def with_config(kind, **changes):
    model, config = files(kind)
    return repaired(model, {**json.loads(config), **changes})


def table_of(model):
    """The JSON object in the blob ``table``."""
    return json.loads(zstandard.ZstdDecompressor().decompress(load(model)["table"].numpy().tobytes()))


def blob(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def packed(table):
    """The blob of any JSON value, or of bytes in its place."""
    data = table if isinstance(table, bytes) else json.dumps(table).encode()
    return blob(zstandard.ZstdCompressor().compress(data))


def with_table(kind, **changes):
    """The table's fields changed."""
    model, config = files(kind)
    tensors = {**load(model), "table": packed({**table_of(model), **changes})}
    return repaired(save(tensors), json.loads(config))


def with_tensors(kind, change):
    """The model file's tensors changed."""
    model, config = files(kind)
    return repaired(save(change(load(model))), json.loads(config))


def with_bare_chunks(chunks, tensors, factors=None, **changes):
    """A model file of a table of ``tensors`` and of nothing but chunks."""
    _, config = files("ranked")
    blobs = {"kept": blob(chunks), "table": packed({"tensors": tensors})}
    model = save(blobs if factors is None else {**blobs, "factors": blob(factors)})
    return repaired(model, {**json.loads(config), "entries": 1 << 61, **changes})


def chunks_of(kind, name="kept"):
    return bytes(load(files(kind)[0])[name].numpy())


def chunk(span, kept, *streams, coding=GAPS, shift=0, dtype="float32", form=0):
    """A chunk of streams that are stored as they are, or given as (bytes in the file, stated size)."""
    stored = [s if isinstance(s, tuple) else (s, len(s)) for s in streams]
    head = HEAD.pack(span, kept, coding, shift, DTYPES.index(dtype), form)
    return head + b"".join(STREAM.pack(len(data), size) + data for data, size in stored)


def refused(model, config, message=None):
    with pytest.raises(ValueError, match=message) as caught:
        SparseDelta.from_bytes(model, config)
    assert str(caught.value).strip()


def check_valid(delta):
    for name, sparse in delta.tensors.items():
        positions = sparse.indices.long()
        assert len(positions) == len(sparse.values), name
        assert bool((positions.diff() > 0).all())
        assert not len(positions) or (int(positions[0]) >= 0 and int(positions[-1]) < prod(sparse.shape))
        assert bool(torch.isfinite(sparse.values).all())
        assert sparse.values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if sparse.factors is not None:
            assert bool(torch.isfinite(sparse.factors.left).all() & torch.isfinite(sparse.factors.right).all())
            assert sparse.factors.product().numel() == prod(sparse.shape)


def outcome(read):
    """Whether a delta is read; anything but a valid one or a ValueError with a message goes up."""
    delta, message, started = None, "", time.process_time()
    try:
        delta = read()
    except ValueError as error:
        message = str(error).strip()
    assert time.process_time() - started < 2, "too slow"
    if delta is None:
        assert message
        return False
    check_valid(delta)
    again = SparseDelta.from_bytes(*delta.to_bytes(positions="index"))
    assert again.info == delta.info
    for name, sparse in delta.tensors.items():  # any scale can be written by hand, and is then rounded once more
        if delta.info.dtype not in INTEGERS:
            assert torch.equal(again.tensors[name].values, sparse.values)
        if sparse.factors is not None and delta.info.factors_dtype not in INTEGERS:
            assert torch.equal(again.tensors[name].factors.left, sparse.factors.left)
            assert torch.equal(again.tensors[name].factors.right, sparse.factors.right)
    return True
