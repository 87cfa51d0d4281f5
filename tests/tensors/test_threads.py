"""Work over threads gives what one thread gives, in the order of the names."""

import threading

import pytest
import torch

from dpp_lightning.tensors.threads import in_order, over_threads


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_every_name_is_worked_on_once_and_results_keep_their_order(four_threads):
    sizes = {f"t{i}": size for i, size in enumerate([1 << 18, 0, 5, 1 << 20, 1 << 19, 1, 1 << 20])}
    calls, threads = [], set()

    def work(name):
        calls.append(name)
        threads.add(threading.get_ident())
        return name.upper()

    results = over_threads(work, sizes)
    assert list(results.items()) == [(name, name.upper()) for name in sizes] == list(in_order(work, sizes).items())
    assert sorted(calls) == sorted([*sizes, *sizes])
    assert len(threads) > 1


def test_little_work_starts_no_thread(four_threads):
    threads = over_threads(lambda name: threading.get_ident(), {"a": 10, "b": 20})
    assert set(threads.values()) == {threading.get_ident()}


def test_an_error_in_a_thread_is_raised(four_threads):
    def work(name):
        if name == "b":
            raise ValueError(f"{name} is damaged")

    with pytest.raises(ValueError, match="b is damaged"):
        over_threads(work, {"a": 1 << 20, "b": 1 << 20})


def test_no_names_are_no_work():
    assert over_threads(str.upper, {}) == {}
