"""Threads that share a model, or a delta, take turns: each answer is that of its delta, and the base comes back."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interrupted import at_every_line
from torch import nn

from dpp_lightning import prune
from dpp_lightning.delta.locks import locked

THREADS, ROUNDS = 4, 60


@pytest.fixture(autouse=True)
def frequent_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))).eval()


def all_threads(work):
    with ThreadPoolExecutor(THREADS) as pool:
        return [future.result(60) for future in [pool.submit(work, i) for i in range(THREADS)]]


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@torch.no_grad()
def test_every_answer_is_that_of_its_delta_and_the_base_comes_back():
    base, x = model(0), torch.randn(2, 12)
    before = copy.deepcopy(base.state_dict())
    deltas = [prune(base, model(1 + i), "dare", 0.5, seed=i) for i in range(THREADS)]
    expected = []
    for delta in deltas:
        alone = copy.deepcopy(base)
        delta.apply_(alone)
        expected.append(alone(x))

    def answer(i):
        right = 0
        for _ in range(ROUNDS):
            with deltas[i].applied(base):
                right += torch.equal(base(x), expected[i])
        return right

    assert all_threads(answer) == [ROUNDS] * THREADS
    assert same(base.state_dict(), before)


def test_one_delta_on_a_model_a_thread_forgets_none():
    base = model(0)
    delta = prune(base, model(1), "dare", 0.5)
    targets = [copy.deepcopy(base) for _ in range(THREADS)]

    def rounds(i):
        for _ in range(ROUNDS):
            delta.apply_(targets[i])
            delta.revert_(targets[i])

    all_threads(rounds)
    assert not delta.is_applied
    assert all(same(target.state_dict(), base.state_dict()) for target in targets)


def test_apply_waits_for_the_end_of_another_threads_block():
    base = model(0)
    one, other = (prune(base, model(i), "dare", 0.5) for i in (1, 2))
    done = threading.Event()

    def apply():
        other.apply_(base)
        done.set()

    thread = threading.Thread(target=apply)
    with one.applied(base):
        thread.start()
        assert not done.wait(0.2)
    thread.join(10)
    assert done.is_set()
    assert other.is_applied


def test_an_interrupt_at_any_line_leaves_no_lock_held():
    def hold(things):
        with locked(things):
            pass

    def check(things):
        thread = threading.Thread(target=hold, args=(things,), daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()

    at_every_line(lambda: ([torch.zeros(1), torch.zeros(1)],), hold, check, more_than=8)


def test_a_model_that_had_a_delta_can_still_be_moved_by_swapping_its_tensors():
    """As FSDP2 does; torch refuses tensors with weak references."""
    base = model(0)
    prune(base, model(1), "dare", 0.5).apply_(copy.deepcopy(base))
    delta = prune(base, model(1), "dare", 0.5)
    with delta.applied(base):
        pass
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        base.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert base[0].weight.dtype == torch.float64


def test_threads_that_share_a_part_of_a_model_take_turns():
    base = model(0)
    part = nn.Sequential(base[0], base[1])
    changed = nn.Sequential(*(nn.Linear(12, 12) for _ in range(2)))
    on_part, on_whole = prune(part, changed, "dare", 0.5), prune(base, model(1), "dare", 0.5)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (on_part.apply_(part), done.set()))
    with on_whole.applied(base):
        thread.start()
        assert not done.wait(0.2)
    thread.join(10)
    assert done.is_set()
