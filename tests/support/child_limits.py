"""A function of a test in a child process with limits on memory and time, so that a hostile file harms nobody."""

import multiprocessing
import resource
import sys

import pytest

_CONTEXT = "fork"


def run_limited(work, *, megabytes, seconds):
    """Call ``work`` in a child that may take so much more memory than it starts with, and so much time.

    Returns:
        What it returned, or the exception that ended it as ``(class name, message)``.
    """
    if sys.platform != "linux":
        pytest.skip("limits of memory are those of Linux")
    context = multiprocessing.get_context(_CONTEXT)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(work, megabytes, sender), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            pytest.fail(f"not done in {seconds} s")
        return receiver.recv()
    except EOFError:
        pytest.fail(f"killed, with more than {megabytes} MB in use")
    finally:
        child.kill()
        child.join()


def _limited(work, megabytes, sender):
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 1_000_000,) * 2)
    try:
        result = work()
    except BaseException as error:
        result = type(error).__name__, str(error)[:500]
    sender.send(result)
