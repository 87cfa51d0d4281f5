"""Runs commands of ``dpp`` in forks of one process that has everything imported, with faults of the disk in them.

Started with the library of ``disk_faults.c`` preloaded; its path is the only argument. Takes one JSON object a line on
standard input, and answers each with one on standard output.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

MODES = {"off": 0, "count": 1, "kill": 2, "ENOSPC": 3, "EIO": 4}


def act(words):
    """The exit code of a command, and on standard error what the interpreter would print."""
    from dpp_lightning.cli import main

    try:
        return main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def run(library, job, answers):
    """In the child: arm the faults, run the command, leave without clean-up."""
    with open(job["stderr"], "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.close(answers)
    os.chdir(job["folder"])
    library.disk_faults_arm(job["root"].encode(), MODES[job["mode"]], job["number"])
    code = act(job["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child, seconds):
    """The status of a child; -9 after it was killed, also for being late."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve():
    """Answer until the input ends."""
    library = ctypes.CDLL(sys.argv[1])
    library.disk_faults_call.restype = ctypes.c_char_p
    answers = os.dup(1)
    os.dup2(2, 1)  # what a command prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        if job["mode"] == "warm":  # in this process, so that all later forks have its imports
            os.chdir(job["folder"])
            answer = {"code": act(job["words"])}
            gc.freeze()
        else:
            child = os.fork()
            if child == 0:
                run(library, job, answers)
            code = wait(child, job["seconds"])
            calls = [library.disk_faults_call(k + 1).decode() for k in range(library.disk_faults_count())]
            library.disk_faults_arm(b"", MODES["off"], 0)
            answer = {"code": code, "calls": calls, "stderr": Path(job["stderr"]).read_text(errors="replace")}
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve()
