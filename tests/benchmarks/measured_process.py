"""A call in a process of its own: its seconds, and the peak of its private memory."""

import json
import subprocess
import sys
from typing import NamedTuple

_MEASURE = """
import json, sys, threading, time
def _anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
_function, _arguments = json.loads(sys.argv[1])
_idle, _peak, _going = _anonymous(), [0.0], [True]
def _watch():
    while _going:
        _peak[0] = max(_peak[0], _anonymous())
        time.sleep(0.005)
_thread = threading.Thread(target=_watch); _thread.start()
_wall, _cpu = time.perf_counter(), time.process_time()
globals()[_function](*_arguments)
_wall, _cpu = time.perf_counter() - _wall, time.process_time() - _cpu
_going.clear(); _thread.join()
print("\\n" + json.dumps([_wall, _cpu, _peak[0] - _idle]))
"""


class Measured(NamedTuple):
    """Seconds by the clock and of the processors, and MiB of RssAnon (private memory) above the idle interpreter's."""

    wall: float
    cpu: float
    peak: float


def measured(definitions: str, function: str, *arguments: object) -> Measured:
    """Call a function in a new interpreter, which has run its definitions before it is measured.

    Args:
        definitions: Python text, imports and functions.
        function: name of one of them.
        arguments: what json has, or paths.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    call = json.dumps([function, arguments], default=str)
    done = subprocess.run([sys.executable, "-c", definitions + _MEASURE, call], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Measured(*json.loads(done.stdout.splitlines()[-1]))
