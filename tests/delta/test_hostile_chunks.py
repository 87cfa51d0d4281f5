"""Chunks that no writer makes: always a ValueError, before memory is taken for what they claim."""

import random
import struct
import time
import tracemalloc
from math import prod

import pytest
import torch
import zstandard
from hostile import (
    check_valid,
    chunk,
    refused,
    with_bare_chunks,
)

from dpp_lightning.delta.coding.positions import ALL, BITMAP, SEED
from dpp_lightning.delta.sparse_delta import SparseDelta

HEAD, STREAM = struct.Struct("<QIBBBB"), struct.Struct("<II")


ONE_TENSOR = [["w", [100]]]  # a table of one tensor
FLOAT = [b"\x7f\0"] * 4  # planes of two values
CHUNK_FAULTS = {
    "more kept than entries": (chunk(100, 101, b"", b""), ONE_TENSOR, "101 kept in 100"),
    "no entries": (chunk(0, 0, b"", b""), ONE_TENSOR, "0 kept in 0"),
    "more entries than the tensors": (chunk(101, 0, b"", b""), ONE_TENSOR, "where 100 entries are left"),
    "a span of 2**60": (chunk(2**60, 2, b"\0\0", b"", *FLOAT), ONE_TENSOR, "where 100 entries are left"),
    "kept 2**31": (chunk(2**33, 2**31, b"", b""), [["w", [2**33]]], "chunk of 2147483648 kept"),
    "fewer entries than the tensors": (chunk(99, 0, b"", b""), ONE_TENSOR, "1 entries before"),
    "seed without one": (chunk(100, 2, *FLOAT, coding=SEED), ONE_TENSOR, "do not follow from a seed"),
    "unknown coding": (chunk(100, 2, b"\0\0", b"", *FLOAT, coding=4), ONE_TENSOR, "coding 4"),
    "unknown form": (chunk(100, 2, b"\0\0", b"", *FLOAT, form=2), ONE_TENSOR, "form 2"),
    "all of some": (chunk(100, 2, *FLOAT, coding=ALL), ONE_TENSOR, "2 kept of 100"),
    "a short bitmap": (chunk(100, 50, b"\xff", *[bytes(50)] * 4, coding=BITMAP), ONE_TENSOR, "bitmap of 1 bytes"),
    "a bitmap of others": (chunk(100, 50, b"\xff" * 13, *[bytes(50)] * 4, coding=BITMAP), ONE_TENSOR, "marks 100"),
    "fewer gaps": (chunk(100, 2, b"\0", b"", *FLOAT), ONE_TENSOR, "end 1 gaps"),
    "more gaps": (chunk(100, 2, b"\0\0\0", b"", *FLOAT), ONE_TENSOR, "2 are the most|end 3 gaps"),
    "positions beyond": (chunk(100, 2, b"\x60\x03", b"", *FLOAT), ONE_TENSOR, "position 100 of 100"),
    "low bits for nothing": (chunk(100, 2, b"\0\0", b"\0", *FLOAT, shift=4), ONE_TENSOR, "low bits"),
    "fewer values": (chunk(100, 2, b"\0\0", b"", b"\x7f", *FLOAT[1:]), ONE_TENSOR, "streams of"),
    "not finite": (chunk(100, 2, b"\0\0", b"", b"\xff\xff", *FLOAT[1:]), ONE_TENSOR, "not finite"),
    "another dtype": (chunk(100, 2, b"\0\0", b"", *FLOAT[:2], dtype="bfloat16"), ONE_TENSOR, "holds them in float32"),
    "integers": (chunk(100, 2, b"\0\0", b"", b"\1\1", b"\0", b"\0", dtype="int8"), ONE_TENSOR, "holds them in float32"),
    "a stream longer than the file": (chunk(100, 2, b"\0\0", b"", *FLOAT)[:-1], ONE_TENSOR, "are the most"),
    "a stream less": (chunk(100, 2, b"\0\0", b"", *FLOAT[:3]), ONE_TENSOR, "cut short"),
    "half a head": (chunk(100, 2)[:9], ONE_TENSOR, "end 100 entries before"),
    "a stream that is no zstandard": (
        chunk(100, 2, b"\0\0", b"", (b"x", 2), *FLOAT[1:]),
        ONE_TENSOR,
        "cannot be decompressed",
    ),
    "a second chunk": (chunk(100, 2, b"\0\0", b"", *FLOAT) * 2, ONE_TENSOR, "bytes follow the last chunk"),
}


@pytest.mark.parametrize("fault", CHUNK_FAULTS)
def test_chunks_that_no_writer_makes_are_refused(fault):
    blob, table, message = CHUNK_FAULTS[fault]
    refused(*with_bare_chunks(blob, tensors=table, dtype="float32"), message)


def test_the_chunk_that_these_are_made_of_is_read():
    for names, dtype in ((ONE_TENSOR, "float32"), (ONE_TENSOR, None), ([["v", [0, 3]], ["w", [100]], ["x", []]], None)):
        blob = chunk(sum(prod(shape) for _, shape in names), 2, b"\0\2", b"", *FLOAT)
        delta = SparseDelta.from_bytes(*with_bare_chunks(blob, tensors=names, dtype=dtype))
        assert delta.tensors["w"].indices.tolist() == [0, 3]
        assert bool(torch.isfinite(delta.tensors["w"].values).all())


def test_descending_and_equal_positions_cannot_be_written():
    """All a gap can say is how many entries, none at least, lie between two kept ones: every byte is a sorted set."""
    rng = random.Random(0)
    for _ in range(300):
        gaps = bytes(rng.choice([0, 0, 1, 5, 40, 254]) for _ in range(8))
        files_ = with_bare_chunks(chunk(2000, 8, gaps, b"", *[b"\x7f" * 8] * 4), tensors=[["w", [2000]]], dtype=None)
        check_valid(SparseDelta.from_bytes(*files_))


ZEROS = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
UNSTATED = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(1 << 28))
LYING = ZEROS.replace((1 << 28).to_bytes(4, "little"), (2).to_bytes(4, "little"), 1)
BOMBS = {
    "a size beyond the kept entries": ((ZEROS, 1 << 28), "are the most"),
    "a frame of less than a frame": ((ZEROS[:-1], len(ZEROS)), "does not state"),
    "a frame that gives more than it states": ((LYING, 1 << 20), "does not state|decompressed"),
    "a frame that states no size": ((UNSTATED, 1 << 20), "does not state"),
    "a frame that states another size": ((ZEROS, 1 << 20), "does not state"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("index", [0, 1])
def test_a_small_file_cannot_take_much_memory(bomb, index):
    """256 MiB of zeros in 8 kB, among the positions and among the values: refused before memory is taken."""
    stream, message = BOMBS[bomb]
    streams = [b"\0" * (1 << 20), b"", *[b"\0" * (1 << 20)] * 4]
    streams[2 * index] = stream
    blob = chunk(1 << 34, 1 << 20, *streams)
    model, config = with_bare_chunks(blob, tensors=[["w", [1 << 34]]], dtype="float32")
    tracemalloc.start()
    try:
        refused(model, config, message)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


CLAIMS = {
    "a wide bitmap": chunk(1 << 34, 1, (ZEROS, 1 << 31), *[b"\0"] * 4, coding=BITMAP),
    "far gaps": chunk(1 << 34, 1, (ZEROS, (1 << 34) // 255), b"", *[b"\0"] * 4),
    "all of them": chunk(1 << 34, 1 << 20, *[b"\0" * (1 << 20)] * 4, coding=ALL),
    "many low bits": chunk(1 << 34, 1 << 20, b"\0" * (1 << 20), (ZEROS, 1 << 25), *[b"\0"] * 4, shift=255),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_positions_of_a_huge_span_take_no_memory_for_it(claim):
    model, config = with_bare_chunks(CLAIMS[claim], tensors=[["w", [1 << 34]]], dtype="float32")
    tracemalloc.start()
    try:
        refused(model, config)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


HALVES_OF_BYTES = {
    "a half behind the last": (b"\x21\x13", "half a byte behind"),
    "the integer -8": (b"\x81\x03", "beyond 7"),
    "a byte for each": (b"\1\1\1", "streams of"),
    "a byte too few": (b"\1", "streams of"),
}


@pytest.mark.parametrize("fault", HALVES_OF_BYTES)
def test_int4_is_two_integers_a_byte_and_nothing_else(fault):
    def case(integers):
        blob = chunk(100, 3, b"\0\0\0", b"", integers, b"\x7f", b"\0", dtype="int4")
        return with_bare_chunks(blob, ONE_TENSOR, dtype="int4")

    data, message = HALVES_OF_BYTES[fault]
    refused(*case(data), message)
    values = SparseDelta.from_bytes(*case(b"\xf1\x03")).tensors["w"].values
    assert (values / values[0]).tolist() == [1, -1, 3]


MAP = [["w", [4, 3], 1]]  # a table of one tensor with factors: 7 numbers
NOTHING = chunk(12, 0, b"", b"")  # kept beside them
FACTOR_FAULTS = {
    "gaps": (chunk(7, 7, b"\0" * 7, b"", *[b"\x7f" * 7] * 4), "states 7 of 7 numbers"),
    "a bitmap of all": (chunk(7, 7, b"\x7f", *[b"\x7f" * 7] * 4, coding=BITMAP), "states 7 of 7 numbers"),
    "some": (chunk(7, 6, *[b"\x7f" * 6] * 4, coding=ALL), "states 6 of 7 numbers"),
    "none": (chunk(7, 0, coding=ALL), "states 0 of 7 numbers"),
    "from a seed": (chunk(7, 7, *[b"\x7f" * 7] * 4, coding=SEED), "do not follow from a seed"),
    "too few": (chunk(6, 6, *[b"\x7f" * 6] * 4, coding=ALL), "1 entries before"),
    "too many": (chunk(8, 8, *[b"\x7f" * 8] * 4, coding=ALL), "where 7 entries are left"),
    "another dtype": (chunk(7, 7, *[b"\x7f" * 7] * 2, coding=ALL, dtype="bfloat16"), "holds them in float32"),
    "not finite": (chunk(7, 7, b"\xff" * 7, *[b"\x7f" * 7] * 3, coding=ALL), "not finite"),
    "fewer values": (chunk(7, 7, b"\x7f", *[b"\x7f" * 7] * 3, coding=ALL), "streams of"),
    "no bytes": (b"", "7 entries before"),
}


@pytest.mark.parametrize("fault", FACTOR_FAULTS)
def test_chunks_of_factors_that_no_writer_makes_are_refused(fault):
    blob, message = FACTOR_FAULTS[fault]
    refused(*with_bare_chunks(NOTHING, MAP, blob, dtype="float32"), message)


def test_the_factors_that_these_are_made_of_are_read():
    blob = chunk(7, 7, *[b"\x7f" * 7] * 4, coding=ALL)
    delta = SparseDelta.from_bytes(*with_bare_chunks(NOTHING, MAP, blob, dtype="float32"))
    assert (delta.tensors["w"].factors.left.shape, delta.tensors["w"].factors.right.shape) == ((4, 1), (1, 3))
    check_valid(delta)


HALVES = [[b"\0" * (1 << 20)] * 4, [(ZEROS, 1 << 28), *[b"\0" * (1 << 20)] * 3]]


@pytest.mark.parametrize("streams", HALVES, ids=["fewer than the rank", "a stream of 256 MiB"])
def test_factors_of_a_huge_tensor_take_no_memory_for_it(streams):
    """Of a rank of 2**17 in 2**36 entries: 2**36 numbers are claimed, a million are there."""
    nothing = chunk(1 << 36, 0, b"", b"")
    blob = chunk(1 << 20, 1 << 20, *streams, coding=ALL)
    case = with_bare_chunks(nothing, [["w", [1 << 18, 1 << 18], 1 << 17]], blob, dtype="float32")
    tracemalloc.start()
    try:
        refused(*case)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("kept", [0, 1, 1 << 20])
def test_a_seed_is_not_asked_for_billions_of_positions(rate, kept):
    planes = [b"\0" * kept] * 4 if kept else []
    blob = chunk(1 << 35, kept, *planes, coding=SEED)
    changes = {"pruning_rate": rate, "q": 1.0, "dtype": "float32", "positions": "seed", "seeded": True}
    case = with_bare_chunks(blob, tensors=[["w", [1 << 35]]], **changes)
    started = time.perf_counter()
    refused(*case, "no seed keeps")
    assert time.perf_counter() - started < 1
