"""Runs of several processes into one folder take turns, or share it as workers."""

import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from dpp_lightning.experiments.run_lock import CLAIMS_FOLDER, alone_in
from dpp_lightning.experiments.sweep_worker import Worker

COUNT = """
import sys, time
from pathlib import Path
from dpp_lightning.experiments.run_lock import alone_in
folder = Path(sys.argv[1])
for _ in range(5):
    with alone_in(folder, lambda text: None):
        file = folder / "count"
        count = int(file.read_text()) if file.exists() else 0
        time.sleep(0.02)
        file.write_text(str(count + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from dpp_lightning.experiments.run_lock import alone_in
with alone_in(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""
WORK = """
import sys, time
from pathlib import Path
from dpp_lightning.experiments.sweep_worker import Worker
worker = Worker(Path(sys.argv[1]))
worker.enter(print)
assert worker.take("a") and worker.take_report(5)
worker.reported()
print("held", flush=True)
time.sleep(60)
"""


def start(program, folder):
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)


def test_no_two_runs_are_in_a_folder_at_once(tmp_path):
    workers = [start(COUNT, tmp_path / "out") for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert (tmp_path / "out/count").read_text() == "20"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["count"]


def test_a_killed_run_keeps_nobody_out_and_one_that_lives_is_waited_for(tmp_path):
    told = []
    owner = start(HOLD, tmp_path)
    assert owner.stdout.readline() == "held\n"

    def note(text):
        told.append(text)
        owner.send_signal(signal.SIGKILL)
        owner.wait()

    with alone_in(tmp_path, note):
        assert (tmp_path / CLAIMS_FOLDER).exists()
    assert len(told) == 1
    assert "another run writes into" in told[0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
    with alone_in(tmp_path / "out", print):
        pass
    assert list(tmp_path.iterdir()) == []


class Waits(Exception):
    """Raised in place of waiting."""


def no_wait(text):
    raise Waits(text)


def entered(folder, stack):
    worker = stack.enter_context(Worker(folder))
    worker.enter(no_wait)
    return worker


def test_workers_are_in_a_folder_together_and_no_run_is_alone_there_before_the_last_left(tmp_path):
    with ExitStack() as stack:
        first, second = entered(tmp_path, stack), entered(tmp_path, stack)
        assert first.take("a")
        assert not second.take("a")
        assert second.take("b")
        with pytest.raises(Waits, match="another run writes into"), alone_in(tmp_path, no_wait):
            pass
        assert not second.take("a")
        first.__exit__(None, None, None)
        assert second.take("a")
        with pytest.raises(Waits), alone_in(tmp_path, no_wait):
            pass
    assert list(tmp_path.iterdir()) == []
    with alone_in(tmp_path, no_wait), pytest.raises(Waits), ExitStack() as stack:
        entered(tmp_path, stack)
    assert list(tmp_path.iterdir()) == []


def test_one_worker_reports_and_another_does_if_there_are_more_rows_or_it_is_gone(tmp_path):
    with ExitStack() as stack:
        first, second, third = (entered(tmp_path, stack) for _ in range(3))
        assert (first.take_report(5), first.reports) == (True, True)
        assert not second.take_report(5)
        first.__exit__(None, None, None)  # without a report
        assert (second.take_report(5), second.reports) == (True, True)
        second.reported()
        second.__exit__(None, None, None)
        assert (third.take_report(5), third.reports) == (True, False)
        assert (third.take_report(6), third.reports) == (True, True)
    with ExitStack() as stack:  # the command is repeated
        again = entered(tmp_path, stack)
        assert (again.take_report(6), again.reports) == (True, True)


def test_what_killed_workers_left_is_removed_by_the_next(tmp_path):
    owner = start(WORK, tmp_path)
    assert owner.stdout.readline() == "held\n"
    owner.kill()
    owner.wait()
    assert {path.name for path in (tmp_path / CLAIMS_FOLDER).iterdir()} > {"a", "report", "reported"}
    with ExitStack() as stack:
        worker = entered(tmp_path, stack)
        assert worker.take("a")
        assert (worker.take_report(5), worker.reports) == (True, True)
    assert list(tmp_path.iterdir()) == []
