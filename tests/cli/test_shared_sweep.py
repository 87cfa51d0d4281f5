"""Several dpp sweep on one output folder share its rows, and what they make is what one makes."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from sweep_job import SweepProcess, fitted, sweep_result

from dpp_lightning.experiments.grid import Experiment

METHODS = ("dare", "darex-q", "magnitude")
GRID = ["--methods", *METHODS, "--rates", "0.5", "0.9", "--seeds", "0", "1", "--curve", "darex-q"]
RUNS_HERE = "the row is made"
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The words of a sweep but for its folder."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}
    with fitted(tmp_path_factory.mktemp("job"), 3, (200, 40), optimizer=optimizer) as words:
        yield ["sweep", *words, *GRID, "--output"]


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """What one worker makes."""
    folder = tmp_path_factory.mktemp("whole")
    worker = SweepProcess([*job, folder / "out"], folder / "said.txt")
    assert worker.end() == 0, worker.said()
    return in_order(folder / "out")


@pytest.fixture
def held(job, tmp_path):
    """A folder, and a worker in it that never ends its sixth row: the second of those for which q was searched once."""
    worker = SweepProcess([*job, tmp_path / "out"], tmp_path / "held.txt", stop_in_sixth_row)
    try:
        worker.wait_for(RUNS_HERE)
        yield tmp_path / "out", worker
    finally:
        worker.end(signal.SIGKILL)


def stop_in_sixth_row():
    """Have the process stay in its sixth row for good: scored, but neither saved nor recorded."""
    finish, rows = Experiment._result, []

    def stop(self, *arguments):
        rows.append(1)
        if len(rows) == 6:
            print(RUNS_HERE, flush=True)
            time.sleep(1000)
        return finish(self, *arguments)

    Experiment._result = stop


def in_order(folder):
    """A sweep's result with the rows in an order of their own."""
    made = sweep_result(folder)
    made["rows"].sort(key=lambda row: (row["method"], row["pruning_rate"] or 0, row["seed"] or 0))
    runs = [row.pop("run") for row in made["rows"] if "run" in row]
    return made | {"runs": runs}


def test_the_rows_of_a_killed_worker_are_made_by_the_others_and_all_are_those_of_one(job, held, whole, tmp_path):
    folder, killed = held
    others = [SweepProcess([*job, folder], tmp_path / f"{number}.txt") for number in range(2)]
    for other in others:
        other.wait_for("waiting for the rows of another worker: darex-q 0.5")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert [worker.end() for worker in others] == [0, 0], [worker.said() for worker in others]
    assert in_order(folder) == whole
    assert len(whole["rows"]) == 2 + 2 * 2 + 2 * 2 + 2
    wrote = [str(folder / "table.md") in worker.said() for worker in others]
    assert sorted(wrote) == [False, True]
    last = others[wrote.index(False)].said().splitlines()[-1]
    assert last.startswith("dpp sweep: made ")
    assert last.endswith("; the table is written by another worker")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--split", "validation"], "split test in the file, validation now"),
        (["--data.max_length", "3"], "of the fine-tuned model"),
        (["--seeds", "1", "0"], "first seed 0 in the file, 1 now"),
    ],
)
def test_another_sweep_beside_one_is_refused_and_changes_nothing(changed, named, job, held, tmp_path):
    folder, _ = held
    before = {name: (folder / name).read_bytes() for name in ("results.jsonl", "config_sweep.yaml")}
    words = [word for word in job if word not in ("--seeds", "0", "1")] if changed[0] == "--seeds" else job
    other = SweepProcess([*words, folder, *changed], tmp_path / "other.txt")
    assert other.end() == 2
    (error,) = (line for line in other.said().splitlines() if line.startswith("dpp sweep: "))
    assert named in error
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_worker_that_waits_ends_at_a_signal(number, code, job, held, tmp_path):
    folder, _ = held
    waiting = SweepProcess([*job, folder], tmp_path / "waiting.txt")
    waiting.wait_for("waiting for the rows of another worker")
    assert waiting.end(number) == code
    said = waiting.said()
    assert "dpp sweep: stopped. To go on where it was, repeat the command" in said
    assert "Traceback" not in said
    assert (folder / ".claims").is_dir()  # of the one that lives


def test_more_methods_are_made_beside_a_worker_that_does_not_know_them(job, held, tmp_path):
    folder, _ = held
    words = [*job[: job.index("--methods")], "--methods", "magnitude", "--rates", "0.3", "--output"]
    more = SweepProcess([*words, folder], tmp_path / "more.txt")
    assert more.end() == 0, more.said()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["pruning_rate"]) for row in rows[-1:]] == [("magnitude", 0.3)]
    assert "| magnitude | 0.3 |" in (folder / "table.md").read_text()


@pytest.mark.slow
def test_four_commands_one_of_them_killed(job, whole, tmp_path):
    words = [sys.executable, "-m", "dpp_lightning", *job, str(tmp_path / "out")]
    workers = [subprocess.Popen(words, cwd=tmp_path, **QUIET) for _ in range(4)]
    while not (owners := [owner_of(path) for path in tmp_path.glob("out/.claims/darex-q-*")]):
        assert any(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    (killed,) = (worker for worker in workers if worker.pid == owners[0])
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert [worker.wait(300) for worker in workers if worker is not killed] == [0, 0, 0]
    assert in_order(tmp_path / "out") == whole


def owner_of(claim):
    """The process that has a claim, which may be written at this moment."""
    while not (pids := re.findall(r"pid=(\d+)\n", claim.read_text())):
        time.sleep(0.001)
    return int(pids[0])
