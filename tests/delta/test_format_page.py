"""The page "The delta file format" is enough to read a delta: a reader written from it alone decodes what we write."""

import json
import re
from dataclasses import replace
from pathlib import Path

import format_reader
import numpy as np
import pytest
import tiny
import torch
from factored import factored_pair

from dpp_lightning import SparseDelta, prune
from dpp_lightning.tensors.names import canonical_tensors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "dpp_lightning/README.md").read_text("utf-8").split("## The delta file format")[1].split("\n## ")[0]
GOLDEN = sorted((ROOT / "tests/fixtures").glob("delta_v3_*"))


def same(delta: SparseDelta, read: format_reader.Delta) -> None:
    """Positions, values, dense tensors: bit for bit."""
    assert list(read.tensors) == list(delta.tensors)
    for name, (shape, positions, values) in read.tensors.items():
        assert tuple(shape) == delta.tensors[name].shape
        assert positions == delta.tensors[name].indices.tolist()
        held = delta.tensors[name].values
        wide = held if held.dtype == torch.float64 else held.float()
        assert values.tobytes() == wide.numpy().tobytes()
    assert list(read.factors) == [name for name, tensor in delta.tensors.items() if tensor.factors is not None]
    for name, (left, right) in read.factors.items():
        factors = delta.tensors[name].factors
        assert left.tobytes() == factors.left.contiguous().numpy().tobytes()
        assert right.tobytes() == factors.right.contiguous().numpy().tobytes()
    assert (read.reverted, read.unchanged) == ([*delta.info.reverted], [*delta.info.unchanged])
    assert read.names == delta.info.names
    for dense, other in ((delta.carried, read.carried), (delta.new_rows, read.new_rows)):
        assert {n: t.float().numpy().tobytes() for n, t in dense.items()} == {
            n: np.ascontiguousarray(t, "<f4").tobytes() for n, t in other.items()
        }


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_golden_files_are_read_from_the_page_alone(folder):
    expected, read = json.loads((folder / "expected.json").read_text()), format_reader.read_delta(folder)
    for name, (shape, positions, bits) in expected["tensors"].items():
        assert [list(read.tensors[name][0]), read.tensors[name][1]] == [shape, positions]
        assert read.tensors[name][2].view("<i4").tolist() == bits
    lefts = {name: list(stored) for name, stored in expected.get("factors", {}).items()}
    assert list(read.factors) == list(lefts)
    for name, (left, right) in read.factors.items():
        halves = [np.ascontiguousarray(left.T)] if right.shape[1] == 1 else [np.ascontiguousarray(left.T), right]
        assert [half.view("<i4").reshape(-1).tolist() for half in halves] == lefts[name]
    for kind, dense in (("carried", read.carried), ("new_rows", read.new_rows)):
        assert {name: tensor.view("<i4").tolist() for name, tensor in dense.items()} == expected[kind]
    c = read.config
    info = [c["method"], float(c["pruning_rate"]), c["seed"], float(c["q"]), c["seeded"], c["dtype"]]
    assert info == expected["info"]
    assert len(GOLDEN) == 6


ALL_DTYPES = ("float32", "bfloat16", "float16", "float64", "int8", "int4", "int3", "int2", None)
CODINGS = [
    ("dare", 0.9, "seed", ALL_DTYPES),
    ("dare", 0.3, "seed", ("float32",)),  # the sampler draws what is dropped
    ("dare", 0.9, "index", ("bfloat16",)),
    ("dare", 0.0, "index", ("float32", "int4")),  # every entry is kept
    ("magnitude", 0.5, "index", ALL_DTYPES),  # a bitmap
    ("magnitude", 0.997, "index", ("float16",)),  # gaps with low bits, tensors that keep nothing
    ("importance", 0.9, "index", ("float32", "bfloat16", "float16", None)),  # signs
]


@pytest.mark.parametrize("factors_dtype", ALL_DTYPES)
@pytest.mark.parametrize("kept_in_a_chunk", [None, 128])
def test_factors_are_read_from_the_page_alone(tmp_path, monkeypatch, factors_dtype, kept_in_a_chunk):
    """128 numbers are a whole number of groups that share a scale."""
    if kept_in_a_chunk:
        for limit in ("CHUNK_KEPT", "CHUNK_LEAST"):
            monkeypatch.setattr(f"dpp_lightning.delta.coding.chunk_stream.{limit}", kept_in_a_chunk)
    for method, drawn_rate, rest in (("magnitude", None, False), ("dare", 0.8, False), ("dare", 0.8, True)):
        _, delta = factored_pair(method, drawn_rate=drawn_rate, rest=rest, factors_dtype=factors_dtype)
        for positions in ("seed", "index") if method == "dare" else ("index",):
            read = format_reader.read_delta(delta.save_pretrained(tmp_path / "delta", positions=positions))
            same(delta, read)
            assert len(read.factors) == 8


def test_names_of_the_table_are_read_from_the_page_alone(tmp_path):
    base, finetuned = tiny.pair()
    with torch.no_grad():
        finetuned.norm.weight.copy_(base.norm.weight)
    delta = prune(base, finetuned, "dare", 0.9, exclude=["gain"], outside="revert")
    delta = SparseDelta(delta.tensors, {}, replace(delta.info, names={"gain": "net.gain"}))
    read = format_reader.read_delta(delta.save_pretrained(tmp_path / "delta"))
    same(delta, read)
    assert read.reverted == ["gain"]
    assert "norm.weight" in read.unchanged


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("kept_in_a_chunk", [None, 128])
def test_every_coding_is_read_from_the_page_alone(tmp_path, monkeypatch, dtype, kept_in_a_chunk):
    """With few kept entries to a chunk, chunks begin and end inside of tensors."""
    if kept_in_a_chunk:
        for limit in ("CHUNK_KEPT", "CHUNK_LEAST", "SEEDED_LEAST"):
            monkeypatch.setattr(f"dpp_lightning.delta.coding.chunk_stream.{limit}", kept_in_a_chunk)
    base, finetuned = tiny.pair()
    heads = set()
    for method, rate, positions, dtypes in CODINGS:
        if dtype in dtypes:
            q = {"q": 0.2} if method == "importance" else {}
            delta = prune(base, finetuned, method, rate, seed=3, dtype=dtype, carry=["head.bias"], **q)
            folder = delta.save_pretrained(tmp_path / f"{method}-{rate}-{positions}", positions=positions)
            read = format_reader.read_delta(folder)
            same(delta, read)
            heads.update(read.heads)
    if dtype == "float32":
        assert {coding for coding, _, _ in heads} == {0, 1, 2, 3}
        assert {form for _, _, form in heads} == {0, 1}
    assert {kind for _, kind, _ in heads} == {dtype or "float32"}


def test_hashes_and_sums_are_those_of_the_page(tmp_path):
    base, finetuned = tiny.pair()
    delta = prune(base, finetuned, "dare", 0.8, seed=5, carry=["head.bias"])
    read = format_reader.read_delta(delta.save_pretrained(tmp_path / "delta"))
    held = {name: tensor.detach().numpy() for name, tensor in canonical_tensors(base).items()}
    kept = {name: positions for name, (_, positions, _) in read.tensors.items()}
    check, first = format_reader.base_check([held[name] for name in kept], list(kept.values()))
    assert (check, first) == (read.config["base_check"], read.config["base_first"])
    others = {name: tensor for name, tensor in held.items() if name != "head.bias"}
    assert format_reader.base_fingerprint(others) == read.config["base_fingerprint"]
    sums = {
        name: format_reader.applied(held[name], positions, values, float(read.config["q"]))
        for name, (_, positions, values) in read.tensors.items()
    }
    delta.apply_(base)
    applied = canonical_tensors(base)
    assert {n: t.tobytes() for n, t in sums.items()} == {n: applied[n].detach().numpy().tobytes() for n in sums}


def test_the_pages_example_of_the_sampler():
    positions = format_reader.sampler("net.0.weight", 200_000, "0.999", 12345)
    stated = re.search(r"`net.0.weight` of 200,000 entries keeps (\d+) at p = 0.999 and seed 12345, the first of them "
                       r"([\d, ]+)\.", " ".join(PAGE.split()))  # fmt: skip
    assert [len(positions), positions[:4]] == [int(stated[1]), [int(n) for n in stated[2].split(", ")]]


UNUSUAL = {
    "base_name": "a/b", "base_revision": "c", "dtype": "bfloat16", "factors_dtype": "int4", "drawn_rate": 0.8, "rest": True,
    "training": {"texts": 8}, "scope": {"kind": "all"}, "settings": {"a": 1}, "prefix": "bert.",
}  # fmt: skip


def test_the_page_lists_every_field_of_the_config_and_what_one_that_is_left_out_stands_for(tmp_path):
    delta = prune(*tiny.pair(), "dare", 0.8)
    full = SparseDelta(delta.tensors, {}, replace(delta.info, **UNUSUAL))
    folder = full.save_pretrained(tmp_path / "full", side_files={"merges.txt": None})
    config = json.loads((folder / "delta_config.json").read_text())
    table = PAGE.split("### `delta_config.json`")[1].split("###")[0]
    rows = re.findall(r"^\| (`.*?`) \|[^|]*\|([^|]*)\|", table, re.MULTILINE)
    usual = {name: value for names, value in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(usual) == sorted(config)
    absent = {name: json.loads(value.strip(" `")) for name, value in usual.items() if value.strip()}
    assert sorted(absent) == sorted([*UNUSUAL, "absent_files"])
    plain = SparseDelta(delta.tensors, {}, replace(delta.info, scope={}, dtype=None))
    config = json.loads(plain.to_bytes()[1])
    assert sorted(config) == sorted(set(usual) - set(absent))
    read = SparseDelta.from_bytes(*plain.to_bytes()).info
    assert {name: getattr(read, name) for name in absent} == {**absent, "absent_files": ()}


def test_odd_text_in_a_config_has_the_checksum_of_the_page(tmp_path):
    base, finetuned = tiny.pair()
    delta = prune(base, finetuned, "dare", 1e-05)
    delta.info.scope.update({"größe": ["\u91cd\u307f", '"\\\t', "\U0001f600\x7f", 1e-07, 3, True, None]})
    format_reader.read_delta(delta.save_pretrained(tmp_path / "delta"))
