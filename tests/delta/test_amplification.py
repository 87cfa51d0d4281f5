"""A small file takes little memory and time when it is read, however legal each of its chunks is."""

import json
import time
from io import BytesIO

import pytest
import torch
import zstandard
from child_limits import run_limited
from hostile import chunk, files, refused, with_bare_chunks, with_config

from dpp_lightning import SparseDelta, prune
from dpp_lightning.delta.coding.chunk_stream import ChunkWriter
from dpp_lightning.delta.coding.positions import ALL, SEED
from dpp_lightning.delta.contents import SparseTensor

MOST = 1_310_720  # kept entries of a chunk
LIMIT = {"megabytes": 120, "seconds": 5}


def zeros(size):
    """A stream of zeros, as small as can be."""
    return zstandard.ZstdCompressor(level=19).compress(bytes(size)), size


def read(model, config):
    delta = SparseDelta.from_bytes(model, config)
    return len(delta.tensors)


def all_kept(chunks, dtype="float32", planes=4):
    """So many chunks of which every entry is kept and 0, in some hundred bytes each."""
    one = chunk(MOST, MOST, *[zeros(MOST)] * planes, coding=ALL, dtype=dtype)
    return with_bare_chunks(one * chunks, [["w", [MOST * chunks]]], dtype=dtype)


def test_legal_chunks_of_nothing_but_zeros_are_refused():
    """Of these 16 kB a reader that decodes what it is given makes 860 MB."""
    model, config = all_kept(60)
    assert len(model) < 20_000
    name, message = run_limited(lambda: read(model, config), **LIMIT)
    assert name == "ValueError"
    assert "bytes of chunks that ask for" in message


def test_one_such_chunk_is_read():
    assert run_limited(lambda: read(*all_kept(1)), **LIMIT) == 1


def test_factors_of_nothing_but_zeros_are_refused():
    size = 1 << 20
    side, one = 1 << 13, chunk(size, size, *[zeros(size)] * 2, coding=ALL, dtype="bfloat16")
    nothing = chunk(side * side, 0, b"", b"")
    rank = side // 2
    case = with_bare_chunks(
        nothing,
        [["w", [side, side], rank]],
        one * (2 * side * rank // size),
        dtype="bfloat16",
        factors_dtype="bfloat16",
    )
    assert len(case[0]) < 20_000
    name, message = run_limited(lambda: read(*case), **LIMIT)
    assert name == "ValueError"
    assert "bytes of chunks that ask for" in message


@pytest.mark.parametrize("rank", [[], [1]], ids=["kept", "factors"])
def test_more_tensors_than_the_bytes_can_be_about_are_refused(rank):
    rows = [[f"{i:x}", [1, 1], *rank] for i in range(100_000)]
    numbers = chunk(200_000, 200_000, *[zeros(200_000)] * 4, coding=ALL) if rank else None
    case = with_bare_chunks(chunk(100_000, 0, b"", b""), rows, numbers, dtype="float32", factors_dtype="float32")
    name, message = run_limited(lambda: read(*case), **LIMIT)
    assert name == "ValueError"
    assert "tensors" in message or "table" in message


def test_tensors_of_more_entries_than_the_model_are_refused_before_anything_is_decoded(monkeypatch):
    _, config = files("ranked")
    entries = json.loads(config)["entries"]
    monkeypatch.setattr("dpp_lightning.delta.folder.ChunkReader", lambda *_, **__: pytest.fail("read the chunks"))
    refused(*with_config("ranked", entries=entries - 1), f"{entries:,} entries, of a model that has {entries - 1:,}")
    delta = prune({"w": torch.zeros(4)}, {"w": torch.ones(4)}, "magnitude", 0.5)
    with pytest.raises(ValueError, match="4 entries, of a model that has 3"):
        delta.with_changes(entries=3).to_bytes()


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", "int4", "int2", "float64"])
@pytest.mark.parametrize("positions", ["seed", "index"])
def test_a_delta_of_equal_values_is_written_so_that_it_can_be_read(dtype, positions):
    """It compresses to nothing; streams are stored as they are where the bound would be passed."""
    size = 6_000_000
    base = {"w": torch.zeros(size), "head": torch.zeros(2)}
    delta = prune(base, {"w": torch.ones(size), "head": torch.ones(2)}, "dare", 0.2, dtype=dtype)
    model, config = delta.to_bytes(positions=positions)
    assert len(model) < delta.num_kept
    back = SparseDelta.from_bytes(model, config)
    for name, tensor in delta.tensors.items():
        assert torch.equal(back.tensors[name].indices, tensor.indices)
        assert torch.equal(back.tensors[name].values, tensor.values)


def test_ordinary_deltas_are_compressed_as_ever(monkeypatch):
    monkeypatch.setattr("dpp_lightning.delta.coding.chunk_stream.most_memory", lambda stored: 1 << 60)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4_000_000, generator=generator)}
    delta = prune(
        base, {"w": base["w"] + 0.01 * torch.randn(4_000_000, generator=generator)}, "dare", 0.5, dtype="int4"
    )
    unbounded = delta.to_bytes()
    monkeypatch.undo()
    assert delta.to_bytes() == unbounded


def test_a_seed_is_not_asked_for_millions_of_blocks():
    """Drawing no entry of 2**42 would take a minute."""
    blob = chunk(1 << 42, 0, coding=SEED)
    seeded = {"dtype": "float32", "positions": "seed", "seeded": True, "q": 1.0, "pruning_rate": 0.99999999999}
    case = with_bare_chunks(blob, [[f"w{i}", [1 << 36]] for i in range(64)], **seeded)
    assert run_limited(lambda: read(*case), megabytes=120, seconds=2) == (
        "ValueError",
        "a seed that draws from 1,048,576 blocks for 16 bytes of chunks",
    )
    writer = ChunkWriter(BytesIO(), seeded=True, dtype=None)
    nothing = torch.empty(0, dtype=torch.int64)
    for i in range(17):
        writer.add(f"w{i}", SparseTensor((1 << 36,), nothing, torch.empty(0)))
    with pytest.raises(ValueError, match=r"278,528 blocks .* give positions='index'"):
        writer.close()


def test_five_hundred_tensors_of_odd_sizes_are_drawn_at_once():
    base = {f"w{size}": torch.zeros(size) for size in range(20_000, 20_500)}
    delta = prune(base, {name: tensor + 1 for name, tensor in base.items()}, "dare", 0.9)
    case = delta.to_bytes(positions="seed")
    started = time.process_time()
    assert read(*case) == 500
    assert time.process_time() - started < 1
