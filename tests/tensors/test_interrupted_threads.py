"""Work over threads that is interrupted: no call goes on afterwards, though a thread may."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dpp_lightning.tensors.threads as threads


class Interrupted(ThreadPoolExecutor):
    """As if Ctrl-C came while the pool starts its threads, so that it does not wait for them."""

    def map(self, work, *arguments):
        for given in zip(*arguments, strict=True):
            self.submit(work, *given)
        time.sleep(0.02)
        raise KeyboardInterrupt

    def __exit__(self, *_):
        self.shutdown(wait=False)


def test_no_call_begins_or_goes_on_after_an_interrupt(monkeypatch):
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Interrupted)
    begun, ended = [], []

    def work(name):
        begun.append(name)
        time.sleep(0.01)
        ended.append(name)

    workers = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            threads.over_threads(work, dict.fromkeys(range(40), 1 << 18))
    finally:
        torch.set_num_threads(workers)
    assert 0 < len(begun) < 40
    assert sorted(begun) == sorted(ended)
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count
