"""One of several workers fails: all of them keep their weights, and the last one alone says so, as vLLM needs it."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dpp_lightning import prune

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, see tests/serving/vllm_env.sh"),
]


class Model(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.failing = nn.Parameter(weight.clone()), False

    def load_weights(self, weights):
        for _, tensor in weights:
            self.weight.data.copy_(tensor)
        if self.failing:
            self.failing = False
            raise MemoryError("no room")


@pytest.fixture
def made(tmp_path):
    """The base, a delta's folder and its dense values."""
    torch.manual_seed(0)
    base = torch.randn(30, 20)
    delta = prune({"weight": base}, {"weight": base + torch.randn(30, 20)}, "dare", 0.5)
    delta.save_pretrained(tmp_path / "delta")
    save_file({"weight": base}, tmp_path / "model.safetensors")
    dense = {"weight": base.clone()}
    delta.apply_(dense)
    return base, tmp_path, dense["weight"]


@pytest.fixture
def worker(made, monkeypatch):
    """Makes the worker of a rank out of two; ``others`` are the messages of the other one, in their order."""
    from dpp_lightning.serving.vllm import engine

    base, folder, _ = made
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)

    def make(rank, others):
        alone = SimpleNamespace(world_size=1, rank_in_group=0)
        both = SimpleNamespace(world_size=2, rank_in_group=rank, cpu_group=None)
        monkeypatch.setattr(engine, "_groups", lambda: (both, alone))

        def gather(texts, own, group):
            texts[rank], texts[1 - rank] = own, others.pop(0)

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                quantization=None, use_mla=False, is_moe=False, model=str(folder / "model.safetensors"), revision=None
            ),
            load_config=SimpleNamespace(load_format="auto"),
            parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        )
        model = Model(base)
        return model, engine.DppEngine(None, config, torch.device("cpu"), model)

    return make


def test_a_worker_that_succeeds_keeps_its_weights_where_another_fails(worker, made):
    base, folder, dense = made
    update = {"delta": str(folder / "delta")}
    for others in (["not there"], ["", "no room", ""]):  # as the other one reads, and as it writes
        model, first = worker(0, others)
        first.update_weights(update)  # says nothing: it is not the last one
        assert torch.equal(model.weight, base)
        assert not others
    model, last = worker(1, ["not there", "", "", "", "no room", ""])
    with pytest.raises(ValueError, match="not there"):
        last.update_weights(update)
    last.update_weights(update)
    assert torch.equal(model.weight, dense)
    with pytest.raises(ValueError, match="no room; the weights are as before"):
        last.update_weights({"delta": None})
    assert torch.equal(model.weight, dense)


def test_a_worker_that_fails_to_write_is_put_back(worker, made):
    base, folder, dense = made
    model, last = worker(1, [""] * 9)
    last.update_weights({"delta": str(folder / "delta")})
    model.failing = True
    with pytest.raises(ValueError, match="no room; the weights are as before"):
        last.update_weights({"delta": None})
    assert torch.equal(model.weight, dense)
    last.update_weights({"delta": None})
    assert torch.equal(model.weight, base)


def test_what_cannot_be_put_back_asks_for_a_restart(worker, made):
    _, folder, _ = made
    _, last = worker(1, ["", "no room", "no room"])
    with pytest.raises(RuntimeError, match="restart the server"):
        last.update_weights({"delta": str(folder / "delta")})
    with pytest.raises(RuntimeError, match="restart the server"):
        last.update_weights({"delta": None})


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({}, "update_info"),
        ({"delta": 3}, "delta must be a text or null, got 3"),
        ({"delta": None, "force": "yes"}, "force must be true or false"),
        ({"delta": None, "name": "x"}, "update_info"),
    ],
)
def test_an_update_that_makes_no_sense_is_refused(worker, update, message):
    for rank in (0, 1):
        _, engine = worker(rank, [])
        if rank == 0:
            engine.update_weights(update)
        else:
            with pytest.raises(ValueError, match=message):
                engine.update_weights(update)


def test_there_is_nothing_to_give_beforehand(worker):
    _, last = worker(1, [])
    last.init_transfer_engine(last.parse_init_info({}))
    with pytest.raises(ValueError, match="nothing to give, got base"):
        last.init_transfer_engine(last.parse_init_info({"base": "x"}))
