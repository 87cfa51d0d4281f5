"""Runs of several processes into one folder take turns."""

import signal
import subprocess
import sys

from dpp_lightning.experiments.run_lock import CLAIMS_FOLDER, alone_in

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
