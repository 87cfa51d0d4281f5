"""One command, run once for every call that changes the disk, with a fault at that call; what is wrong afterwards."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODES = ("kill", "ENOSPC", "EIO")
BAR = re.compile(
    r"\s*$|.*[━╸╺]|.*\d+/(\d+|\?) (bytes|kB|MB)"
)  # the bar of rich, which is drawn once where there is no terminal


class FaultServer:
    """Commands of ``dpp`` in forks of one process, with faults of the disk.

    Args:
        place: folder for the compiled library and what the commands say.
    """

    def __init__(self, place):
        compiler = shutil.which("cc") or shutil.which("gcc")
        if sys.platform != "linux" or compiler is None:
            pytest.skip("needs Linux and a C compiler")
        self.place, library = place, place / "disk_faults.so"
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, HERE / "disk_faults.c", "-ldl"],
            check=True,
        )
        settings = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "500"}
        settings |= {"HF_DATASETS_CACHE": str(place / "datasets"), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fault_server.py", library],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(place / "server.txt").open("w"),
            text=True,
        )

    def run(self, words, folder, root="", mode="off", number=0, seconds=60):
        """Run a command; answers ``code``, ``calls`` below the root and ``stderr``.

        Args:
            words: of the command line.
            folder: it runs in.
            root: the folder whose calls count.
            mode: of ``disk_faults.c``, ``off``, or ``warm`` for a run in the server itself.
            number: of the call at which the fault is.
            seconds: after which it is killed.
        """
        job = {"words": [str(word) for word in words], "folder": str(folder), "root": str(root), "mode": mode}
        job |= {"number": number, "seconds": seconds, "stderr": str(self.place / "stderr.txt")}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.place / "server.txt").read_text()
        return json.loads(line)

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait(30)


def held(folder):
    """Every file below a folder, by name, with its bytes; None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def own_disk(folder, kilobytes):
    """A file system of its own at a folder, which is skipped where it cannot be mounted.

    Yields:
        To be called to make it read-only.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def call_name(answer, number):
    """The call at which a run met its fault, without what is random in its name."""
    call = answer["calls"][number - 1] if len(answer["calls"]) >= number else "nothing"
    return re.sub(r"\.[a-z0-9_]{8}\b", ".XXXXXXXX", call)


@dataclass
class Campaign:
    """A command whose outputs are folders below one root.

    Attributes:
        server: runs it.
        words: of the command line, outputs relative to ``root``'s place ``{root}``.
        folder: of the inputs, in which it runs.
        root: holds the outputs and nothing else.
        older: the outputs that are there before, by name; empty for none.
        whole: the outputs of an undisturbed run.
        faults: what was found wrong, one line each.
        tried: number of disturbed runs.
    """

    server: FaultServer
    words: list
    folder: Path
    root: Path
    older: dict = field(default_factory=dict)
    whole: dict = field(default_factory=dict)
    faults: list = field(default_factory=list)
    tried: int = 0

    def run(self, mode):
        """A run for each call with the fault at it; what is wrong afterwards is in ``faults``."""
        calls, inputs = self._run_undisturbed()["calls"], held(self.folder)
        for number in range(1, len(calls) + 1):
            self._prepare()
            answer = self._run(mode, number)
            call = call_name(answer, number)
            self._judge_all(f"{mode} at {number}, {call}", mode, call, answer, inputs)

    def run_killed_at_random_times(self, times):
        """So many runs that are killed before an undisturbed one would be done."""
        start = time.perf_counter()
        self._run_undisturbed()
        seconds, inputs, rng = time.perf_counter() - start, held(self.folder), random.Random(0)
        for number in range(times):
            self._prepare()
            answer = self._run("count", seconds=rng.uniform(0.01, seconds))
            assert answer["code"] in (0, -9)
            self._judge_all(f"kill {number}", "kill", "", answer, inputs)

    def _run_undisturbed(self):
        self._prepare()
        answer = self._run("count")
        assert answer["code"] == 0, answer["stderr"]
        self.whole = self._state()
        return answer

    def _run(self, mode, number=0, seconds=60):
        words = [word.format(root=self.root) for word in self.words]
        return self.server.run(words, self.folder, self.root, mode, number, seconds)

    def _prepare(self):
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        for name, files in self.older.items():
            for file, data in files.items():
                (self.root / name / file).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name / file).write_bytes(data)

    def _state(self):
        """The outputs: what is below the root and has no hidden name."""
        return {p.name: held(p) for p in self.root.iterdir() if not p.name.startswith(".")}

    def _hidden(self):
        return [p.name for p in self.root.iterdir() if p.name.startswith(".")]

    def _judge_all(self, moment, mode, call, answer, inputs):
        """Look at everything after one disturbed run, and after the one that follows."""
        self.tried += 1
        before = len(self.faults)
        self._judge(mode, call, answer)
        if held(self.folder) != inputs:
            self.faults.append("the inputs are changed")
        self._judge_next()
        self.faults[before:] = [f"{moment}: {fault}" for fault in self.faults[before:]]

    def _judge(self, mode, call, answer):
        """Look at the outputs and at what was said, after a disturbed run."""
        state, name, text = self._state(), self.words[0], answer["stderr"]
        for output in {**self.whole, **self.older, **state}:
            if state.get(output) not in (self.older.get(output), self.whole.get(output)):
                self.faults.append(f"{output} is neither the older one nor the new one")
        if mode == "kill":
            return
        lines = [line for line in text.splitlines() if not BAR.match(line)]
        if answer["code"] == 0:
            if state != self.whole:
                self.faults.append("exit code 0, but the output is not the new one")
        elif answer["code"] != 1 or len(lines) != 1 or not lines[0].startswith(f"dpp {name}: failed"):
            self.faults.append(f"exit code {answer['code']}, said {text[-600:]!r}")
        elif state == self.whole and "is written" not in text:
            self.faults.append(f"the output is there, said {lines}")
        elif state != self.older and state != self.whole and "is written" not in text:
            self.faults.append(f"a part of the outputs is there, said {lines}")
        if self._hidden() and not call.startswith("remove"):
            self.faults.append(f"{self._hidden()} are left")

    def _judge_next(self):
        """Look at the outputs after an undisturbed run that follows."""
        refused = "--overwrite" not in self.words and self._state() != {}
        answer = self._run("off")
        if refused:
            if answer["code"] != 2 or "already" not in answer["stderr"]:
                self.faults.append(f"next: exit code {answer['code']}, said {answer['stderr'][-300:]!r}")
        elif answer["code"] != 0:
            self.faults.append(f"next: exit code {answer['code']}, said {answer['stderr'][-300:]!r}")
        elif self._state() != self.whole:
            self.faults.append("next: the output is not that of an undisturbed run")
        if self._hidden():
            self.faults.append(f"next: {self._hidden()} are left")
