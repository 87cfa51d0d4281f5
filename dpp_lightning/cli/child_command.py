"""A command of ``dpp`` in a process of its own, which ends when this one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from dpp_lightning.cli.commands import ENDS_WITH
from dpp_lightning.cli.exit_codes import DONE, FAILED, INTERRUPTED, TERMINATED

_POLL, _GRACE = 1.0, 60.0  # seconds between two looks at the parent, and for an end that was asked for
_LAST_LINES = 8


class CommandFailed(OSError):
    """A command that ended with an error, which its log tells.

    Args:
        message: which command, and what it said.
        exit_code: of the command, which becomes that of this process (:mod:`dpp_lightning.cli.exit_codes`).
    """

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_command(words: Sequence[str], log: Path) -> None:
    """Run ``dpp WORDS`` and wait for its end; at a terminal it shows what it always shows, elsewhere its log is a file.

    Args:
        words: from the command's name on.
        log: where the output goes if this process is at no terminal.

    Raises:
        CommandFailed: it ended with an error.
        KeyboardInterrupt: it was stopped by Ctrl-C, as this process was.
        SystemExit: this process was asked to end by SIGTERM; the command was too, and has ended.
    """
    shown = sys.stderr.isatty()
    environment = {**os.environ, ENDS_WITH: str(os.getpid())}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        output = None if shown else file
        child = subprocess.Popen(
            [sys.executable, "-m", "dpp_lightning", *words], env=environment, stdout=output, stderr=output
        )
        code = _wait(child)
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code in (TERMINATED, -signal.SIGTERM):
        raise SystemExit(TERMINATED)
    if code != DONE:
        told = "" if shown else f": {_last_lines(log)}"
        raise CommandFailed(f"dpp {words[0]} ended with code {code}{told}", code)


def end_with_parent() -> None:
    """In a process that :func:`run_command` started: ask it to end when the parent is gone, however that ended."""
    parent = os.environ.get(ENDS_WITH, "")
    if parent.isdigit():
        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()


def _watch(parent: int) -> None:
    """Send SIGTERM to this process once the parent, or a rank's first process, is another one."""
    own = os.getppid()
    if own != parent:  # a rank that the child started; the child itself watches
        return
    while os.getppid() == parent:
        time.sleep(_POLL)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit code. A SIGTERM to this process is passed on; Ctrl-C reaches both by itself."""
    before = signal.getsignal(signal.SIGTERM)
    main = threading.current_thread() is threading.main_thread()
    asked = threading.Event()

    def pass_on(number: int, frame: object) -> None:
        asked.set()
        child.terminate()

    if main:
        signal.signal(signal.SIGTERM, pass_on)
    try:
        code = _wait_patiently(child)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return TERMINATED if asked.is_set() else code


def _wait_patiently(child: subprocess.Popen[bytes]) -> int:
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(_GRACE)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            child.kill()
            child.wait()
        return INTERRUPTED


def _last_lines(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=_LAST_LINES)
    errors = [line for line in lines if "error" in line.lower()]
    return f"{(errors or list(lines) or ['it said nothing'])[-1]} (all of it: {log})"
