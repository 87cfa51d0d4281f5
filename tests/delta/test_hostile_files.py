"""Files that were damaged or made to harm: a ValueError that says why, soon and in little memory, or a valid delta."""

import itertools
import json
import struct
import tracemalloc
from contextlib import suppress

import pytest
import torch
import zstandard
from hostile import (
    KINDS,
    blob,
    check_valid,
    files,
    refused,
    repaired,
    table_of,
    with_config,
    with_table,
    with_tensors,
)

from dpp_lightning import SparseDelta
from dpp_lightning.delta.table_blob import TensorTable, read_table, write_table

HEAD, STREAM = struct.Struct("<QIBBBB"), struct.Struct("<II")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_themselves_are_read_and_every_cut_of_them_is_refused(kind):
    model, config = files(kind)
    check_valid(SparseDelta.from_bytes(model, config))
    for end in {*range(0, len(model), 7), 8, len(model) - 1}:
        refused(model[:end], config)
    for end in {*range(0, len(config) - 2, 7), len(config) - 3}:
        refused(model, config[:end])
    refused(model + b"\0", config)
    refused(model, config[:-1] + b"}")


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_goes_unseen(kind):
    """Without repair the checksums see every one."""
    model, config = files(kind)
    for position in range(0, len(model), 5):
        refused(model[:position] + bytes([model[position] ^ 1 << position % 8]) + model[position + 1 :], config)
    for position in range(0, len(config), 5):
        changed = config[:position] + bytes([config[position] ^ 1 << position % 8]) + config[position + 1 :]
        refused(model, changed)


NAN, HUGE = float("nan"), 10**400
CONFIG_FAULTS = [
    *({"format": value} for value in ("zip", None, 2)),
    *({"format_version": value} for value in (1, 2, 99, "3", None)),
    {"sampler_version": 1},
    *({"pruning_rate": value} for value in (1, 1.5, -0.1, "0.9", True, None, NAN, HUGE, -HUGE, [0.9])),
    *({"q": value} for value in (0, -1, NAN, float("inf"), HUGE, "1", None, True)),
    *({"seed": value} for value in (-1, 1.5, "4", True, None)),
    *({"entries": value} for value in (-1, 1.5, HUGE, None)),
    *({"dense_bytes": value} for value in (-1, HUGE, "many")),
    *({"dtype": value} for value in ("int5", "torch.float32", 3, ["float32"])),
    *({"positions": value} for value in ("gaps", None, 0, ["seed"])),
    *({"method": value} for value in (None, 3, "da\x1b[2Jre")),
    *({key: "a\nb"} for key in ("base_name", "base_revision", "base_fingerprint", "prefix")),
    *({key: [1]} for key in ("base_name", "base_fingerprint", "scope", "settings", "training", "prefix")),
    *({key: 3} for key in ("base_check", "base_first", "absent_files")),
    *({"factors_dtype": value} for value in ("int5", 3, ["int4"])),
    *({"rest": value} for value in (1, "true", [True])),
    *({"drawn_rate": value} for value in (1, -0.1, "0.9", True, NAN, HUGE, [0.9])),
    {"training": {"a": {"b": 1}}},
    {"training": {"split": "a\x1b[2J"}},
    {"settings": {"a": {"b": 1}}},
    {"scope": {"a": [[]]}},
]
TABLE_FAULTS = [
    *({key: [1]} for key in ("reverted", "unchanged", "names")),
    *({key: 3} for key in ("reverted", "unchanged", "names")),
    *({key: [["a"]]} for key in ("reverted", "unchanged", "tensors")),
    {"names": {"a": 1}},
    *(
        {"tensors": value}
        for value in (None, "a", {"a": [1]}, [None], [["a"]], [["a", 3]], [[3, [3]]], [["a", [3], 1]])
    ),
    *({"tensors": [["a", shape]]} for shape in ([-1], [1.0], [True], ["1"], [None], [2**60], [2**19] * 2, [1] * 17)),
    *({"tensors": [["a", shape]]} for shape in ([0, 2**70], [HUGE], [[1]])),
    {"tensors": [["a", [3]], ["a", [3]]]},
    {"tensors": [[f"w{i}", [2**36]] for i in range(65)]},
    {"tensors": []},
    {"tensors": [["embed.weight", [37, 8]]]},
    *({"tensors": [["a", [8, 5], rank]]} for rank in (-1, 6, 1.0, True, None, "1", [1], HUGE)),
    *({"tensors": [["a", shape, rank]]} for shape, rank in (([8], 2), ([], 2), ([0, 3], 1), ([3, 0], 1), ([8], 0))),
]


@pytest.mark.parametrize("change", CONFIG_FAULTS, ids=lambda change: str(change)[:60])
@pytest.mark.parametrize("kind", ["seeded", "ranked"])
def test_fields_out_of_range_are_refused(kind, change):
    refused(*with_config(kind, **change))


@pytest.mark.parametrize("change", TABLE_FAULTS, ids=lambda change: str(change)[:60])
@pytest.mark.parametrize("kind", ["seeded", "ranked", "factors"])
def test_tables_out_of_range_are_refused(kind, change):
    refused(*with_table(kind, **change))


@pytest.mark.parametrize("kind", ["seeded", "ranked", "factors"])
def test_tables_of_other_tensors_than_the_chunks_are_refused(kind):
    rows = table_of(files(kind)[0])["tensors"]
    larger = [[name, [size + 9 for size in shape], *rank] for name, shape, *rank in rows]
    for changed in (rows[1:], [*rows, rows[0]], [*rows, ["more", [5]]], larger, [*rows, ["huge", [10**14]]]):
        refused(*with_table(kind, tensors=changed))


def compress(data, **settings):
    return zstandard.ZstdCompressor(**settings).compress(data)


TABLE = b'{"tensors":[["w",[100]]]}'
TABLES = {
    "no bytes": (b"", "decompressed"),
    "no frame": (TABLE, "decompressed"),
    "a cut frame": (compress(TABLE)[:-1], "decompressed"),
    "more behind the frame": (compress(TABLE) + b"x", "decompressed"),
    "no size": (compress(TABLE, write_content_size=False), "states -1|decompressed"),
    "gigabytes": (compress(bytes(1 << 30), level=1), "are the most"),
    "many times its bytes": (compress(b" " * (1 << 23) + TABLE), "are the most"),
    "no text": (compress(b"\xff\xfe"), "not readable JSON"),
    "no object": (compress(b"[1]"), "no JSON object"),
    "nested": (compress(b"[" * 50_000), "not readable JSON"),
}


def test_the_table_of_a_mixture_with_70_000_experts_is_within_its_bounds():
    """The most regular names that there are: what compresses best must still be read."""
    parts = itertools.product(range(61), range(384), ("gate", "up", "down"))
    table = [(f"layers.{i}.mlp.experts.{j}.{kind}_proj.weight", (2048, 7168)) for i, j, kind in parts]
    blob = write_table(TensorTable(table, [None] * len(table)))
    assert read_table(blob).tensors == table
    assert len(blob) < 4 * len(table)
    with pytest.raises(ValueError, match="more than a file may have"):
        write_table(TensorTable([(f"{name}.{'x' * 300}", shape) for name, shape in table], [None] * len(table)))


@pytest.mark.parametrize("fault", TABLES)
def test_blobs_that_are_no_table_are_refused_before_memory_is_taken(fault):
    data, message = TABLES[fault]
    case = with_tensors("ranked", lambda tensors: {**tensors, "table": blob(data)})
    tracemalloc.start()
    try:
        refused(*case, message)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_seed_is_claimed_only_where_there_is_one():
    refused(*with_config("ranked", positions="seed"), "positions 'seed'")
    refused(*with_config("ranked", positions="seed", seeded=True), "follow from a seed")
    refused(*with_config("seeded", positions="index"), "follow from a seed")
    refused(*with_config("seeded", seed=5), "the seed keeps")
    refused(*with_config("seeded", pruning_rate=0.5), "the seed keeps")
    refused(*with_config("seeded", pruning_rate=0.0), "no seed keeps")


def test_a_file_of_another_version_names_the_library_that_reads_it():
    refused(*with_config("seeded", format_version=4, library_version="9.8"), r"install the dpp_lightning .*'9\.8'")
    model, config = files("seeded")
    for field in ("model_checksum", "config_checksum"):
        refused(model, json.dumps({**json.loads(config), field: "0" * 32}).encode(), "checksum")
        refused(model, json.dumps({k: v for k, v in json.loads(config).items() if k != field}).encode())


BAD_NAMES = [
    "../x",
    "a/../b",
    "/etc/x",
    "..",
    "a\\..\\b",
    "\\\\x",
    "a\0b",
    "a\nb",
    "a\x1b[31m",
    "a\x7f",
    "\u202egpj.exe",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_trick_a_path_or_a_terminal_are_refused(name):
    rows = table_of(files("ranked")[0])["tensors"]
    for change in (
        {"tensors": [[name, rows[0][1]], *rows[1:]]},
        {"reverted": [name]},
        {"unchanged": [name]},
        {"names": {name: "a"}},
        {"names": {"a": name}},
    ):
        refused(*with_table("ranked", **change), "cannot be named")
    with pytest.raises(ValueError, match="cannot be named"):
        write_table(TensorTable([(name, (3,))], [None]))
    if name.isprintable() or name == "a\nb":
        refused(
            *with_tensors("ranked", lambda tensors: {**tensors, f"carried.{name}": torch.ones(2)}), "cannot be named"
        )


@pytest.mark.parametrize("name", ["a/b", "a..b", "model.bert.x", "Größe", "重み", "a b", "0", "a:b", "…"])
def test_other_names_are_not(name):
    table = TensorTable([(name, (3,)), ("w", (3, 2))], [1, None], (f"{name}1",), (f"{name}2",), {name: f"{name}3"})
    assert read_table(write_table(table)) == table


@pytest.mark.parametrize("depth", [5, 100, 300, 900, 990, 2000, 10**5])
def test_deeply_nested_json_is_refused(depth):
    model, config = files("ranked")
    for text in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
        refused(model, text)
        for key in (b'"scope": ', b'"format_version": ', b'"seed": '):
            at = config.index(key) + len(key)
            nested = config[:at] + text + b', "x": ' + config[at:]
            refused(model, nested)
            with suppress(RecursionError):  # of the repair
                fixed = repaired(model, json.loads(nested))
                refused(*fixed)


def test_what_is_no_json_is_refused():
    model, config = files("ranked")
    for text in (
        b"",
        b"\xff\xfe",
        b"{",
        b"null",
        b"3",
        b'"x"',
        b"[]",
        config.decode().encode("utf-16")[:-1],
        b"9" * 5000,
    ):
        refused(model, text)


MODEL_FAULTS = {
    "no blob": lambda t: {n: v for n, v in t.items() if n != "kept"},
    "no table": lambda t: {n: v for n, v in t.items() if n != "table"},
    "table of two dimensions": lambda t: {**t, "table": t["table"][None]},
    "table of other numbers": lambda t: {**t, "table": t["table"].to(torch.int16)},
    "shorter table": lambda t: {**t, "table": t["table"][:-1]},
    "longer table": lambda t: {**t, "table": torch.cat([t["table"], t["table"][:1]])},
    "factors of nothing": lambda t: {**t, "factors": t["kept"].clone()},
    "blob of two dimensions": lambda t: {**t, "kept": t["kept"][None]},
    "blob of other numbers": lambda t: {**t, "kept": t["kept"].to(torch.int16)},
    "blob of signed bytes": lambda t: {**t, "kept": t["kept"].view(torch.int8)},
    "empty blob": lambda t: {**t, "kept": t["kept"][:0]},
    "shorter blob": lambda t: {**t, "kept": t["kept"][:-1]},
    "longer blob": lambda t: {**t, "kept": torch.cat([t["kept"], t["kept"][:1]])},
    "blob twice over": lambda t: {**t, "kept": torch.cat([t["kept"], t["kept"]])},
    "unknown tensor": lambda t: {**t, "more": torch.ones(1)},
    "pruned and carried": lambda t: {**t, "carried.embed.weight": torch.ones(37, 8)},
    "rows of nothing": lambda t: {**t, "rows.nothing": torch.ones(1, 8)},
    "rows of another width": lambda t: {**t, "rows.embed.weight": torch.ones(1, 9)},
    "rows without rows": lambda t: {**t, "rows.embed.weight": torch.ones(())},
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
@pytest.mark.parametrize("kind", ["seeded", "integers"])
def test_other_tensors_than_a_delta_has_are_refused(kind, fault):
    refused(*with_tensors(kind, MODEL_FAULTS[fault]))


FACTOR_FAULTS = {
    "no factors": lambda t: {n: v for n, v in t.items() if n != "factors"},
    "factors of two dimensions": lambda t: {**t, "factors": t["factors"][None]},
    "kept entries in their place": lambda t: {**t, "factors": t["kept"].clone()},
    "shorter factors": lambda t: {**t, "factors": t["factors"][:-1]},
    "longer factors": lambda t: {**t, "factors": torch.cat([t["factors"], t["factors"][:1]])},
    "factors twice over": lambda t: {**t, "factors": torch.cat([t["factors"], t["factors"]])},
    "no bytes of factors": lambda t: {**t, "factors": t["factors"][:0]},
}


@pytest.mark.parametrize("fault", FACTOR_FAULTS)
@pytest.mark.parametrize("kind", ["factors", "seeded factors"])
def test_other_blobs_of_factors_are_refused(kind, fault):
    refused(*with_tensors(kind, FACTOR_FAULTS[fault]))


@pytest.mark.parametrize("kind", ["factors", "seeded factors"])
def test_ranks_that_are_not_those_of_the_blob_are_refused(kind):
    rows = table_of(files(kind)[0])["tensors"]
    first = next(number for number, row in enumerate(rows) if len(row) == 3 and len(row[1]) == 2)
    for rank in (0, 1, 3, 8):
        changed = [*rows[:first], [*rows[first][:2], rank], *rows[first + 1 :]]
        refused(*with_table(kind, tensors=changed))


HEADER = b'{"kept":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    "model",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + HEADER,
        (99_999_999).to_bytes(8, "little") + HEADER,
        *(
            len(text).to_bytes(8, "little") + text + b"1234"
            for text in (
                HEADER.replace(b"U8", b"U9"),
                HEADER.replace(b"[4]", b"[4611686018427387904,4]"),
                HEADER.replace(b"[4]", b"[-4]"),
                HEADER.replace(b"[0,4]", b"[0,4611686018427387904]"),
                HEADER.replace(b"[0,4]", b"[4,0]"),
                b"[" * 50_000,
                b'{"__metadata__":' * 1000,
                b"null",
            )
        ),
    ],
    ids=range(13),
)
def test_model_files_that_safetensors_refuses_too(tmp_path, model):
    """From memory and from a folder."""
    _, config = files("ranked")
    model, config = repaired(model, json.loads(config))
    refused(model, config)
    (tmp_path / "delta_model.safetensors").write_bytes(model)
    (tmp_path / "delta_config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"safetensors"):
        SparseDelta.from_pretrained(tmp_path)
