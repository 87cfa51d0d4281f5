"""Work that is interrupted at one line of the library, as Ctrl-C at a chosen moment would."""

import sys
from pathlib import Path

import pytest

import dpp_lightning

_FOLDERS = tuple(f"{path}/" for path in (*dpp_lightning.__path__, Path(__file__).parents[2]))  # callbacks/ lies there
_TESTS = f"{Path(__file__).parents[1]}/"


class Interrupt(KeyboardInterrupt):
    """So that no other interrupt is taken for it."""


def lines_of(work):
    """How many lines of the library ``work`` runs, in the calling thread."""
    return _run(work, None)


def interrupt_at(line, work):
    """Run ``work`` and raise :class:`Interrupt` as the library's line of that number, from 1, is about to run."""
    _run(work, line)


def at_every_line(make, work, check, *, more_than):
    """Interrupt ``work(*make())`` at each of its lines in turn, and look at what that leaves.

    Args:
        make: the arguments, new and equal at every call.
        work: runs more lines of the library than ``more_than``.
        check: called with the arguments after every interrupt.
    """
    whole = make()
    total = lines_of(lambda: work(*whole))
    assert total > more_than
    for line in range(1, total + 1):
        case = make()
        with pytest.raises(Interrupt):
            interrupt_at(line, lambda case=case: work(*case))
        try:
            check(*case)
        except AssertionError as error:
            error.add_note(f"interrupted at line {line} of {total}")
            raise


def _run(work, at):
    count = 0

    def trace_line(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                frame.f_trace = None
                raise Interrupt
        return trace_line

    def trace_call(frame, event, _):
        file = frame.f_code.co_filename
        return trace_line if file.startswith(_FOLDERS) and not file.startswith(_TESTS) else None

    before = sys.gettrace()
    sys.settrace(trace_call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
