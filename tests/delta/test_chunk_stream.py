"""Lines of chunks and whole deltas: read back as written, in files that stay readable for ever."""

import errno
import json
import threading
from dataclasses import replace
from io import BytesIO
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pair

from dpp_lightning import METHODS, SparseDelta
from dpp_lightning.delta.coding import chunk_stream
from dpp_lightning.delta.coding.chunk import CHUNK_KEPT, CHUNK_LEAST, decode_chunk, read_head
from dpp_lightning.delta.coding.chunk_stream import ChunkReader, ChunkWriter
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.sampling.sampler import kept_positions
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, fake_quantize
from dpp_lightning.tensors.fingerprint import raw_bytes

FIXTURES = Path(__file__).parents[1] / "fixtures"
INFO = DeltaInfo("dare", 0.9, 3, 0.1, True, None, None, "", "", "", 0, 0)
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (0, 3), (3, 0, 2), (1,), (1, 1, 1), (7,), (2, 3, 5), (40, 50)]),
    st.integers(1, 2000).map(lambda n: (n,)),
)


def kept_entries(shape, density, dtype, rng, positions=None):
    """A sparse tensor of random values, at random positions or at those given."""
    numel = prod(shape)
    if positions is None:
        positions = np.flatnonzero(rng.random(numel) < density)
    values = torch.from_numpy(rng.standard_normal(len(positions)))
    return SparseTensor(shape, torch.from_numpy(positions.astype(np.int32)), values.to(dtype))


def written(tensors, *, seeded=False, dtype=None):
    sink = BytesIO()
    writer = ChunkWriter(sink, seeded=seeded, dtype=dtype)
    for name, sparse in tensors.items():
        writer.add(name, sparse)
    writer.close()
    return writer.table, np.frombuffer(sink.getvalue(), dtype=np.uint8)


def read(table, blob, *, seeded=False, info=INFO):
    return dict(ChunkReader(blob, table, info, seeded=seeded).tensors())


def same_entries(a, b):
    """Shape, positions and values bit for bit; the dtype of no values at all is nobody's concern."""
    dtypes = a.values.dtype == b.values.dtype or not a.values.numel()
    same = a.shape == b.shape and torch.equal(a.indices.long(), b.indices.long())
    same = same and (a.factors is None) == (b.factors is None)
    if same and a.factors is not None:
        same = torch.equal(a.factors.left, b.factors.left) and torch.equal(a.factors.right, b.factors.right)
    return same and dtypes and raw_bytes(a.values) == raw_bytes(b.values)


def all_same(a, b):
    return list(a) == list(b) and all(same_entries(a[name], sparse) for name, sparse in b.items())


@st.composite
def lines(draw, **fixed):
    """Tensors of odd shapes, any density, dtypes mixed; and how small the chunks are cut."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = {}
    for number in range(draw(st.integers(0, 8))):
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        shape, density = draw(SHAPES), draw(st.sampled_from([0, 0.001, 0.01, 0.1, 0.3, 0.9, 1]))
        tensors[f"layers.{number}"] = kept_entries(shape, density, dtype, rng)
    most = draw(st.sampled_from([1, 5, 64, 1000, CHUNK_KEPT]))
    return tensors, most, draw(st.integers(1, most))


@settings(max_examples=100, deadline=None)
@given(lines())
def test_what_is_read_is_what_was_written(case):
    tensors, most, least = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_stream, "CHUNK_KEPT", most)
        patch.setattr(chunk_stream, "CHUNK_LEAST", least)
        table, blob = written(tensors)
    assert table == [(name, sparse.shape) for name, sparse in tensors.items()]
    assert all_same(read(table, blob), tensors)


@settings(max_examples=60, deadline=None)
@given(lines(), st.sampled_from([0.0, 0.3, 0.9, 0.999]), st.integers(0, 2**40))
def test_positions_that_follow_from_the_seed_take_no_bytes(case, rate, seed):
    drawn, most, least = case
    tensors = {}
    for name, sparse in drawn.items():
        positions = kept_positions(name, prod(sparse.shape), rate, seed)
        tensors[name] = kept_entries(sparse.shape, 0, sparse.values.dtype, np.random.default_rng(0), positions)
    info = replace(INFO, pruning_rate=rate, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_stream, "CHUNK_KEPT", most)
        patch.setattr(chunk_stream, "SEEDED_LEAST", least)
        table, blob = written(tensors, seeded=True)
    assert all_same(read(table, blob, seeded=True, info=info), tensors)
    heads = [head for _, head in ChunkReader(blob, table, info, seeded=True).heads]
    assert sum(head.stored(values=False) for head in heads) == 0
    assert sum(head.kept for head in heads) == sum(sparse.values.numel() for sparse in tensors.values())


def test_a_tensor_is_cut_and_small_ones_share():
    """The sizes as they are: chunks of at most 2**20 + 2**15 kept entries, of 2**15 at least but for the last."""
    rng = np.random.default_rng(0)
    shapes = [(300,)] * 150 + [(2_500_000,)] + [(300,)] * 50
    tensors = {f"w{i}": kept_entries(shape, 1, torch.bfloat16, rng) for i, shape in enumerate(shapes)}
    table, blob = written(tensors)
    assert all_same(read(table, blob), tensors)
    counts = [head.kept for _, head in ChunkReader(blob, table, INFO, seeded=False).heads]
    assert counts == [33_000, 12_000 + CHUNK_KEPT, CHUNK_KEPT, 2_500_000 - 2 * CHUNK_KEPT, 15_000]
    assert all(CHUNK_LEAST <= count <= CHUNK_KEPT + CHUNK_LEAST for count in counts[:-1])


def test_a_tensor_of_more_than_2_31_entries_has_wide_positions():
    shape = (2**20, 2**12)
    positions = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**32 - 1])
    sparse = SparseTensor(shape, positions, torch.randn(5))
    table, blob = written({"w": sparse, "v": replace(sparse, shape=(2**33,))})
    back = read(table, blob)
    assert all_same(back, {"w": sparse, "v": replace(sparse, shape=(2**33,))})
    assert back["w"].indices.dtype == torch.int64
    assert len(blob) < 200


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_come_back_as_they_were_rounded(dtype):
    rng = np.random.default_rng(0)
    exact = {f"w{i}": kept_entries((n,), 0.5, torch.float32, rng) for i, n in enumerate((0, 1, 60, 700))}
    rounded = {name: replace(sparse, values=fake_quantize(sparse.values, dtype)) for name, sparse in exact.items()}
    table, blob = written(rounded, dtype=dtype)
    assert all_same(read(table, blob, info=replace(INFO, dtype=dtype)), rounded)
    again, same = written(read(table, blob, info=replace(INFO, dtype=dtype)), dtype=dtype)
    assert again == table
    assert bytes(same) == bytes(blob)


def test_tensors_without_kept_entries_between_others():
    rng = np.random.default_rng(0)
    empty = {f"e{i}": kept_entries((5 * i,), 0, torch.float32, rng) for i in range(4)}
    for tensors in ({}, empty, {**empty, "w": kept_entries((9,), 1, torch.float16, rng)}):
        table, blob = written(tensors)
        assert all_same(read(table, blob), tensors)


def equal_deltas(a, b):
    assert a.info == b.info
    assert all_same(a.tensors, b.tensors)
    for dense_a, dense_b in ((a.carried, b.carried), (a.new_rows, b.new_rows)):
        assert dense_a.keys() == dense_b.keys()
        assert all(t.dtype == dense_b[n].dtype and torch.equal(t, dense_b[n]) for n, t in dense_a.items())


def drawn(method, rate, dtype=None, weights=torch.float32, **more):
    """A mask of any method, without the fit that some add to it."""
    plan = PruningPlan.of(*pair(dtype=weights), Scope(carry=("head.*",)))
    matrices = {p.name: torch.ones(p.shape[1], dtype=torch.float64) for p in plan.pairs if len(p.shape) == 2}
    plan = plan.with_inputs({name: InputStatistics(ones, ones, 1, 1) for name, ones in matrices.items()})
    delta = plan.draw(PruningSpec(method, rate, 5, dtype, method_settings=more))
    return delta.rescaled(0.5) if METHODS[method].fit and METHODS[method].fit.required else delta


SELECTIONS = [name for name in METHODS if name != "auto"]  # which takes the selection of another


@pytest.mark.parametrize("method", SELECTIONS)
@pytest.mark.parametrize("rate", [0, 0.5, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("dtype", [None, *FLOATS, *INTEGERS])
def test_decode_is_the_inverse_of_encode(method, rate, dtype):
    """For every method; and what was read is written to the same bytes again and again."""
    if METHODS[method].weighs and dtype in INTEGERS:
        with pytest.raises(ValueError, match="weighs the kept values"):
            drawn(method, rate, dtype)
        return
    if METHODS[method].covers and (not rate or (method == "lowrank" and rate > 0.9)):
        with pytest.raises(ValueError, match=r"keeps more than|leaves fewer numbers"):
            drawn(method, rate, dtype)
        return
    delta = drawn(method, rate, dtype)
    for positions in ("seed", "index") if METHODS[method].seeded else ("index",):
        model, config = delta.to_bytes(positions=positions)
        back = SparseDelta.from_bytes(model, config)
        equal_deltas(back, delta)
        again = back.to_bytes(positions=positions)
        equal_deltas(SparseDelta.from_bytes(*again), delta)
        assert SparseDelta.from_bytes(*again).to_bytes(positions=positions) == again


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", SELECTIONS)
def test_weights_of_other_dtypes(method, weights):
    delta = drawn(method, 0.8, weights=weights)
    equal_deltas(SparseDelta.from_bytes(*delta.to_bytes()), delta)
    halved = SparseDelta.from_bytes(*delta.to_bytes(dtype="bfloat16"))
    assert halved.info == replace(delta.info, dtype="bfloat16")
    for name, sparse in delta.tensors.items():
        assert torch.equal(halved.tensors[name].values, sparse.values.bfloat16())


GOLDEN = [
    "dare_bfloat16", "importance_float32", "magnitude_int4", "factors_int4", "drawn_rate_float16", "drawn_rest_int2",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_a_file_written_today_is_read_for_ever(name):
    """The folders are ``prune(*tiny.pair(), ...)`` of format version 3, with a grown vocabulary and a carried head, and
    ``factored_pair(...)`` of three dtypes of factors.

    Beside each lie its positions and values, the values as the bits of a float32. If this fails, the format has
    changed: raise FORMAT_VERSION and keep a reader for version 3; never write these files anew.
    """
    folder = FIXTURES / f"delta_v3_{name}"
    expected = json.loads((folder / "expected.json").read_text())
    delta = SparseDelta.from_pretrained(folder)
    assert list(delta.tensors) == list(expected["tensors"])
    for tensor, (shape, positions, bits) in expected["tensors"].items():
        sparse = delta.tensors[tensor]
        assert list(sparse.shape) == shape
        assert sparse.indices.tolist() == positions
        assert sparse.values.float().view(torch.int32).tolist() == bits
    for tensor, stored in expected.get("factors", {}).items():
        assert [n.view(torch.int32).tolist() for n in delta.tensors[tensor].factors.stored()] == stored
    for kind, dense in (("carried", delta.carried), ("new_rows", delta.new_rows)):
        assert {n: t.float().view(torch.int32).tolist() for n, t in dense.items()} == expected[kind]
    info = delta.info
    assert [info.method, info.pruning_rate, info.seed, info.q, info.seeded, info.dtype] == expected["info"]


def test_chunks_written_today_are_read_for_ever():
    """One chunk for each coding of positions and each dtype and form of values, as hexadecimal text."""
    for case in json.loads((FIXTURES / "chunks_v3.json").read_text()):
        blob = np.frombuffer(bytes.fromhex(case["hex"]), dtype=np.uint8)
        head = read_head(blob, 0, case["span"], seeded=False)
        assert (head.dtype, head.span, head.kept, head.stop) == (
            case["dtype"],
            case["span"],
            len(case["bits"]),
            len(blob),
        )
        chunk = decode_chunk(blob, head, lambda stored, case=case: np.split(stored, case["cuts"]))
        assert np.concatenate(chunk.positions).tolist() == case["positions"]
        assert chunk.values.float().view(torch.int32).tolist() == case["bits"]


class Full(BytesIO):
    """A disk without room."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "no space left on device")


def write_three(sink, error=None):
    some = kept_entries((300, 300), 0.1, torch.float32, np.random.default_rng(0))
    with ChunkWriter(sink, seeded=False, dtype=None, least=1) as writer:
        writer.add("a", some)
        if error:
            raise error
        writer.add("b", some)
        writer.close()


def test_a_chunk_that_cannot_be_written_is_an_error_of_the_writer_and_leaves_no_thread():
    threads = threading.active_count()
    with pytest.raises(OSError, match="no space left"):
        write_three(Full())
    assert threading.active_count() == threads


def test_an_error_between_two_tensors_waits_for_the_chunk_that_is_being_written():
    sink, threads = BytesIO(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write_three(sink, KeyboardInterrupt())
    assert sink.getbuffer().nbytes > 0
    assert threading.active_count() == threads
