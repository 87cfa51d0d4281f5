"""pool.map: every request gets its own delta's answer, in the order of the requests, however they are divided."""

import pytest
import torch
from test_mixed_batch import Net, ids, net_pool, one_by_one, tuned

from dpp_lightning import prune

TOKENS = ids(40)


class Recorded:
    """A forward that notes how many requests each call has."""

    def __init__(self):
        self.sizes = []

    @torch.no_grad()
    def __call__(self, model, requests):
        self.sizes.append(len(requests))
        return model(torch.stack([TOKENS[place] for _, place in requests]))


def requests(names):
    return [(name, place) for place, name in enumerate(names)]


def delta_of(request):
    return request[0]


@pytest.mark.parametrize("mix_up_to", [None, 0, 1, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_are_those_of_one_request_at_a_time(mix_up_to, batch_size):
    _, pool = net_pool()
    names = [["d0", "d1", None, "d2", "d0", "d0"][place % 6] for place in range(19)] + ["d2"] * 9
    answers = pool.map(requests(names), key=delta_of, forward=Recorded(), batch_size=batch_size, mix_up_to=mix_up_to)
    assert torch.allclose(torch.stack(answers), one_by_one(pool, names, TOKENS), atol=1e-5)


def test_deltas_with_few_requests_share_batches_and_others_do_not():
    _, pool = net_pool()
    forward = Recorded()
    pool.map(requests(["d0"] * 5 + ["d1", "d2"]), key=delta_of, forward=forward, batch_size=4, mix_up_to=1)
    assert forward.sizes == [4, 1, 2]
    forward.sizes.clear()
    pool.map(requests(["d0"] * 5 + ["d1", "d2"]), key=delta_of, forward=forward, batch_size=4, mix_up_to=0)
    assert forward.sizes == [4, 1, 1, 1]


def test_the_two_ways_are_timed_once():
    _, pool = net_pool()
    forward = Recorded()
    pool.map(requests(["d0", "d1", "d2"]), key=delta_of, forward=forward)
    timed = len(forward.sizes)
    pool.map(requests(["d0", "d1", "d2"]), key=delta_of, forward=forward)
    assert timed > 3
    assert len(forward.sizes) - timed <= 3


def test_deltas_that_cannot_share_a_batch_are_answered_all_the_same():
    base, pool = net_pool()
    pool.add("five", prune(base, tuned(base, 7, labels=5), "dare", 0.6, carry=["head.*"]))
    pool.add("grown", prune(base, Net(words=13), "dare", 0.6))
    names = ["d0", "five", "grown", "d1", "five", "grown"]
    answers = pool.map(requests(names), key=delta_of, forward=Recorded(), mix_up_to=8)
    for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
        with torch.no_grad(), pool.use(name) as model:
            assert torch.allclose(answer, model(TOKENS[row : row + 1])[0], atol=1e-5)


def test_with_memory_for_one_delta():
    base, pool = net_pool()
    pool.preload()
    small = type(pool)(base, memory=int(1.4 * pool.stats().num_bytes / 3))
    for name, source in pool._sources.items():
        small.add(name, source.delta)
    names = ["d0", "d1", "d2", "d0"]
    answers = small.map(requests(names), key=delta_of, forward=Recorded(), mix_up_to=4)
    assert torch.allclose(torch.stack(answers), one_by_one(pool, names, TOKENS), atol=1e-5)


def test_what_is_wrong_is_said_before_anything_is_computed():
    _, pool = net_pool()
    forward = Recorded()
    with pytest.raises(ValueError, match="no delta 'x'"):
        pool.map(requests(["d0", "x"]), key=delta_of, forward=forward)
    with pytest.raises(ValueError, match="batch_size"):
        pool.map(requests(["d0"]), key=delta_of, forward=forward, batch_size=0)
    assert forward.sizes == []
    with pytest.raises(ValueError, match="gave 1 results for 2 requests"):
        pool.map(requests(["d0", "d0"]), key=delta_of, forward=lambda model, asked: [0])
    assert pool.map([], key=delta_of, forward=forward) == []
