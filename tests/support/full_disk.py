"""A disk that is full for every file longer than so many bytes."""

from contextlib import contextmanager

import pytest


@contextmanager
def files_up_to(size):
    """While the block runs, a write beyond ``size`` bytes of a file fails with EFBIG, which is said as a full disk is."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    former, highest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, highest))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (former, highest))
