"""Workers of a sweep that have two ranks each: the first rank claims, and both make what it says."""

import subprocess
import sys

import pytest
from sweep_job import fitted, sweep_result

from dpp_lightning.cli import main

pytestmark = pytest.mark.distributed

GRID = ["--methods", "dare", "darex-q", "--rates", "0.5", "0.9", "--seeds", "0", "1", "--output"]
TWO_RANKS = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}
    with fitted(tmp_path_factory.mktemp("job"), 3, (200, 40), optimizer=optimizer) as words:
        yield ["sweep", *words]


def start(words, folder):
    command = [sys.executable, "-m", "dpp_lightning", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_workers_of_two_ranks_make_what_one_process_makes(job, tmp_path):
    workers = [start([*job, *TWO_RANKS, *GRID, str(tmp_path / "out")], tmp_path) for _ in range(2)]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert sorted("the table is written by another worker" in text for text in said) == [False, True]
    assert main([*job, *GRID, str(tmp_path / "alone")]) == 0
    ours, theirs = sweep_result(tmp_path / "out"), sweep_result(tmp_path / "alone")
    assert ours["files"] == theirs["files"]
    assert ours["table"] == theirs["table"]
    figures = [sorted((r["method"], r["folder"] or "", r["score"]) for r in made["rows"]) for made in (ours, theirs)]
    assert figures[0] == figures[1]

    refused = start([*job, *TWO_RANKS, "--split", "validation", *GRID, str(tmp_path / "out")], tmp_path)
    text = refused.communicate(timeout=300)[1]
    assert refused.returncode == 2
    assert "split test in the file, validation now" in text
    assert "Traceback" not in text
    assert sweep_result(tmp_path / "out") == ours
