"""results.jsonl that something else wrote: one line says which line is wrong, whatever it holds."""

import json

import pytest

from dpp_lightning.experiments.grid import Result
from dpp_lightning.experiments.results import ResultsLog

GOOD = {**Result("base", 0.5).to_json(), "monitor": "acc", "run": {"a": 1}}
BAD_LINES = {
    "deep": b"[" * 100_000, "deep in a row": b'{"method": "a", "score": 1, "x": ' + b"[" * 100_000, "a list": b"[1]", "null": b"null",
    "no score": b'{"method": "a"}', "bytes": b"\xff\xfe", "cut": b'{"method": "a", "sc',
}  # fmt: skip
BAD_FIELDS = [
    {"score": "1"}, {"score": True}, {"score": None}, {"method": 3}, {"method": "a\x1b[2J"}, {"method": "\ud800"}, {"seed": 1.5},
    {"pruning_rate": [0.9]}, {"split": {}}, {"monitor": 3}, {"settings": 3}, {"folder": 1}, {"num_bytes": "many"}, {"q": "x"},
]  # fmt: skip


def log(path, run=None):
    return ResultsLog(path / "results.jsonl", "acc", run or {"a": 1}, {})


def write(path, *lines):
    (path / "results.jsonl").write_bytes(b"".join(line + b"\n" for line in (json.dumps(GOOD).encode(), *lines)))


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    write(tmp_path, line, json.dumps(GOOD).encode())
    with pytest.raises(ValueError, match=r"line 2 of .* is no row of results"):
        log(tmp_path).resume()


@pytest.mark.parametrize("change", BAD_FIELDS, ids=str)
def test_a_field_of_another_type_is_no_row(tmp_path, change):
    write(tmp_path, json.dumps(GOOD | change).encode(), json.dumps(GOOD).encode())
    with pytest.raises(ValueError, match=r"line 2 of .* is no row of results"):
        log(tmp_path).resume()


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [
        Result("base", float("inf")),
        Result("dare", 1, 0.9, 0, 0.1, split="test", folder="x"),
        Result("dare", 0.5, 0.5),
    ]
    first = log(tmp_path)
    for row in rows:
        first.append(row)
    assert log(tmp_path).resume() == rows


def test_what_another_run_was_is_said_in_short(tmp_path):
    deep = json.dumps({**GOOD, "run": {"a": "x" * 10_000}}).replace(
        '"run": {', '"run": {"b": ' + "[" * 500 + "]" * 500 + ", "
    )
    (tmp_path / "results.jsonl").write_text(deep + "\n")
    with pytest.raises(ValueError, match="of another run") as caught:
        log(tmp_path).resume()
    assert len(str(caught.value)) < 1500
