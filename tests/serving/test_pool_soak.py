"""Many requests of many threads over more deltas than fit: every answer right, memory flat, the base exact."""

import copy
import random
import threading
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning import DeltaPool, prune

THREADS, DELTAS, FIT = 8, 20, 5
SETTLED = 0.25  # of the requests, after which memory is to stay


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=200, max_position_embeddings=32, **sizes)).eval()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.no_grad()
def make_pool(folder):
    """A pool of deltas in folders with memory for a few, texts, and what the dense models make of them."""
    base, texts, expected = bert(), torch.randint(0, 200, (16, 10)), {}
    pool = DeltaPool(base)
    for seed in range(DELTAS):
        finetuned = copy.deepcopy(base)
        torch.manual_seed(seed)
        for parameter in finetuned.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        delta = prune(base, finetuned, "dare", 0.9, seed=seed, carry=["classifier.*"])
        pool.add(str(seed), delta.save_pretrained(folder / str(seed)))
        dense = copy.deepcopy(base)
        delta.apply_(dense)
        expected[str(seed)] = dense(texts).logits
    pool.preload()
    with pool.mixed(list(expected)):  # so that the memory counts what a mixed batch keeps
        pass
    pool.memory = pool.stats().num_bytes * FIT // DELTAS
    return pool, texts, expected


@pytest.mark.parametrize("requests", [160, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("error")
def test_every_answer_is_the_dense_models(tmp_path, requests):
    pool, texts, expected = make_pool(tmp_path)
    before = {name: tensor.clone() for name, tensor in pool.model.state_dict().items()}
    worst, sizes, done, lock = [0.0] * THREADS, [], [0], threading.Lock()

    @torch.no_grad()
    def work(number):
        chance = random.Random(number)
        for _ in range(requests // THREADS // 4):
            name = str(min(int(chance.expovariate(0.3)), DELTAS - 1))  # some are asked for more than others
            text = chance.randrange(len(texts))
            with pool.use(name) as model:
                answer, held = model(texts[text : text + 1]).logits[0], pool.stats().num_bytes
            worst[number] = max(worst[number], float((answer - expected[name][text]).abs().max()))
            names = [str(chance.randrange(DELTAS)) for _ in range(3)]
            answers = pool.map(
                [(name, chance.randrange(len(texts))) for name in names],
                key=lambda request: request[0],
                forward=lambda model, asked: [
                    (name, text, logits)
                    for (name, text), logits in zip(asked, model(texts[[t for _, t in asked]]).logits, strict=True)
                ],
                mix_up_to=4,
            )
            assert [name for name, _, _ in answers] == names
            for name, text, logits in answers:
                worst[number] = max(worst[number], float((logits - expected[name][text]).abs().max()))
            with lock:
                done[0] += 4
                if done[0] >= SETTLED * requests:
                    sizes.append((resident_bytes(), held))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == requests // THREADS // 4 * 4 * THREADS
    assert max(worst) < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in pool.model.state_dict().items())
    assert max(held for _, held in sizes) <= pool.memory
    assert max(size for size, _ in sizes) - sizes[0][0] < 30e6
    assert pool.stats().evictions > requests // 20
