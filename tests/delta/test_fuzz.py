"""Mutated delta files: a ValueError or a valid delta, never anything else."""

import json
import random
import struct
import sys
from functools import partial

import numpy as np
import pytest
import zstandard
from hostile import (
    KINDS,
    blob,
    chunks_of,
    files,
    outcome,
    packed,
    repaired,
    table_of,
)
from mutations import ODD_BYTES, mutated_bytes
from safetensors.torch import load, save

from dpp_lightning import SparseDelta
from dpp_lightning.delta.coding.chunk import read_head

HEAD, STREAM = struct.Struct("<QIBBBB"), struct.Struct("<II")


ODD_NUMBERS = [
    0,
    1,
    -1,
    7,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**36,
    2**36 + 1,
    2**53,
    2**63,
    10**30,
    0.5,
    1e-300,
    1e308,
]
ODD_VALUES = [
    *ODD_NUMBERS,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "..",
    "int8",
    "float16",
    "seed",
    [],
    [[]],
    {},
    {"a": [1]},
]
FIELDS = ["tensors", "pruning_rate", "seed", "dtype", "q", "positions", "seeded", "factors_dtype", "drawn_rate", "rest"]


def mutated_chunks(kind, name, other_kind, rng):
    """The chunk of a small delta with other bytes, other numbers in a head, or another stream behind the compression."""
    blob = bytearray(chunks_of(kind, name))
    seeded = name == "kept" and kind in ("seeded", "dense", "seeded factors", "factors and a drawn rest")
    head = read_head(np.frombuffer(blob, dtype=np.uint8), 0, 1 << 40, seeded=seeded)
    choice = rng.randrange(4)
    if choice == 0 or not head.streams:
        return mutated_bytes(blob, chunks_of(other_kind), rng)
    begin, stored, size = rng.choice(head.streams)
    if choice == 1:
        at, width = rng.choice([(0, 8), (8, 4), (12, 1), (13, 1), (14, 1), (15, 1), (begin - 8, 4), (begin - 4, 4)])
        number = int.from_bytes(blob[at : at + width], "little")
        number = rng.choice(
            [number + 1, number - 1, rng.randrange(6), rng.choice(ODD_BYTES), number ^ 1 << rng.randrange(8)]
        )
        blob[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        return bytes(blob)
    stream = bytes(blob[begin : begin + stored])
    if stored < size:
        stream = zstandard.ZstdDecompressor().decompress(stream)
    stream = bytearray(mutated_bytes(stream, b"\0\xff\x7f" * 20, rng))
    if choice == 2:
        stream = (stream + bytes(size))[:size]
    packed = zstandard.ZstdCompressor().compress(stream) if rng.random() < 0.3 else bytes(stream)
    blob[begin - 8 : begin + stored] = STREAM.pack(len(packed), len(stream)) + packed
    return bytes(blob)


def mutated_value(value, rng):
    """A JSON value with one odd value somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value, *[field for field in FIELDS if field in value]])
        if rng.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at, kind = rng.randrange(len(value)), rng.randrange(8)
        if kind < 2:
            return [*value[: at + kind], *value[at + 1 - kind :]]
        if kind == 2:
            return rng.sample(value, len(value))
        return [*value[:at], mutated_value(value[at], rng), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)])
    return rng.choice(ODD_VALUES)


def mutation(rng):
    """Two files, one of them or both changed; in half of the cases with checksums that are right again."""
    kind, other_kind = rng.choice(list(KINDS)), rng.choice(list(KINDS))
    model, config = files(kind)
    parsed, what = (
        json.loads(config),
        rng.choice(["model", "text", "values", "values", "table", "table", "chunks", "chunks", "chunks", "both"]),
    )
    if what == "model":
        model = mutated_bytes(model, files(other_kind)[0], rng)
    if what == "text":
        config = mutated_bytes(config, files(other_kind)[1], rng)
        try:
            parsed = json.loads(config)
        except ValueError:
            parsed = None
    if what in ("values", "both"):
        parsed = mutated_value(parsed, rng)
        config = json.dumps(parsed).encode()
    if what in ("chunks", "both"):
        name = "factors" if "factors" in kind and rng.random() < 0.7 else "kept"
        model = save({**load(model), name: blob(mutated_chunks(kind, name, other_kind, rng))})
    if what == "table":
        table = mutated_value(table_of(files(kind)[0]), rng)
        model = save({**load(model), "table": packed(table)})
    repair = rng.random() < 0.5 and isinstance(parsed, dict)
    return repaired(model, parsed) if repair else (model, config)


def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) >> 10 for line in status if line.startswith(field))


def run_mutations(count, seed):
    """Returns how many were read; none may raise the peak of memory by 200 MiB."""
    rng = random.Random(seed)
    linux = sys.platform == "linux"
    if linux:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
    before, read = memory("VmRSS") if linux else 0, 0
    for number in range(count):
        case = mutation(rng)
        try:
            read += outcome(partial(SparseDelta.from_bytes, *case))
        except Exception as error:
            error.add_note(f"mutation {number} of seed {seed}")
            raise
    assert not linux or memory("VmHWM") - before < 200
    return read


def test_mutated_files_are_refused_or_valid():
    """Some are read: odd values of fields that any number fits, or other kept values."""
    assert 10 < run_mutations(500, seed=0) < 250


@pytest.mark.slow
def test_twenty_thousand_mutated_files_are_refused_or_valid():
    """About 20 s."""
    assert 400 < run_mutations(20_000, seed=1) < 10_000


def test_mutated_folders_are_refused_or_valid(tmp_path):
    """The way from a folder, which maps the files."""
    rng = random.Random(2)
    for _ in range(60):
        model, config = mutation(rng)
        (tmp_path / "delta_model.safetensors").write_bytes(model)
        (tmp_path / "delta_config.json").write_bytes(config)
        outcome(partial(SparseDelta.from_pretrained, tmp_path))
