"""The script that is to be run on a GPU runs without one: what fails on the device is then not the script itself."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402


def options(tmp_path, *arguments):
    given = gpu_check.parse(["--device", "cpu", "--small", *arguments])
    given.package = gpu_check.importable_package(tmp_path)
    return given


def rows_of(tmp_path, name, limit=600.0, *arguments):
    rows = gpu_check.run_part(name, options(tmp_path, *arguments), tmp_path, limit)
    return {row["case"]: row for row in rows}


def test_the_parts_of_the_table_are_those_that_can_run():
    assert list(gpu_check.PARTS) == list(gpu_parts.PARTS)
    assert sum(part.limit for part in gpu_check.PARTS.values()) <= 7 * 60


def test_deltas_in_a_process_of_their_own(tmp_path):
    rows = rows_of(tmp_path, "delta")
    assert rows["the base after all that"]["result"] == "the same, bit for bit"
    assert rows["dare: draw"]["seconds"] > 0
    assert not {"failed", "stopped", "not run"} & rows.keys()


def test_a_part_that_fails_or_hangs_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "no such part", gpu_check.Part(60, []))
    failed = rows_of(tmp_path, "no such part")["failed"]["result"]
    assert "exit code 2" in failed
    assert "invalid choice: 'no such part'" in failed
    monkeypatch.setattr(gpu_check, "HERE", tmp_path)
    (tmp_path / "gpu_parts.py").write_text("import time\n\nprint('working', flush=True)\ntime.sleep(600)\n")
    stopped = rows_of(tmp_path / "again", "glue", 5.0)["stopped"]["result"]
    assert stopped == "took longer than 5 s; last line: working"


def test_what_is_missing_is_named_with_the_parts_that_run_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in ("timm", "datasets") else name)
    row = rows_of(tmp_path, "quickstart")["not run"]
    assert row["result"] == "needs datasets, timm"
    text = gpu_check.how_to_bring(["timm>=1.0.31", "datasets>=5.0"])
    assert "Parts that run without them: adamr, delta." in text
    assert "pip install 'timm>=1.0.31' 'datasets>=5.0'" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu_check.PARTS if name != "delta"])
def test_every_other_part(tmp_path, name):
    rows = rows_of(tmp_path, name)
    assert len(rows) > 1
    assert not {"failed", "stopped", "not run"} & rows.keys(), rows


@pytest.mark.slow
def test_the_table(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small", "--parts", "delta", "--output"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[2:4] == ["| part | case | result | seconds | peak MiB |", "|---|---|---|---|---|"]
    assert all(line.count("|") == 6 for line in lines[2:])
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
