"""SGLang's loader gives the model's own loader every tensor of the dense model; a twin in place of SGLang's model."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import pair

from dpp_lightning import prune
from dpp_lightning.serving.sglang import load_delta

EMPTY = torch.empty(0)


class Model:
    def __init__(self):
        self.loaded = {}

    def load_weights(self, weights):
        self.loaded = dict(weights)


def test_base_plus_delta_and_the_base_again(tmp_path):
    base, finetuned = pair()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    delta = prune(base, finetuned, "dare", 0.9, carry=["head.*"])
    delta.save_pretrained(tmp_path / "delta")
    model, source = Model(), str(tmp_path / "model.safetensors")
    load_delta(model, [(source, EMPTY), (str(tmp_path / "delta"), EMPTY)])
    with delta.applied(base):
        expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert model.loaded.keys() == expected.keys()
    assert all(torch.equal(model.loaded[name], expected[name]) for name in expected)
    load_delta(model, [(source, EMPTY)])
    assert all(torch.equal(model.loaded[name], tensor) for name, tensor in base.state_dict().items())


def test_what_is_refused_loads_nothing(tmp_path):
    base, finetuned = pair()
    other, _ = pair(seed=5)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    prune(base, finetuned, "dare", 0.9).save_pretrained(tmp_path / "delta")
    model, source = Model(), str(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not the base of this delta"):
        load_delta(model, [(source, EMPTY), (str(tmp_path / "delta"), EMPTY)])
    with pytest.raises(ValueError, match="got 0"):
        load_delta(model, [])
    assert not model.loaded
