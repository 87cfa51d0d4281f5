"""What is asked of vLLM's loader and engine before anything is written; models with loaders as vLLM's have them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpp_lightning.serving.vllm.loader_check import check_engine, check_loader


class Model(nn.Module):
    """Query and key in one tensor; a norm whose loader adds 1 to what it copied; a tensor that is never loaded."""

    def __init__(self):
        super().__init__()
        self.packed, self.norm = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(4))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "norm":
                self.norm.data.copy_(tensor)
                self.norm.data.copy_(self.norm + 1)
            elif name != "rotary.inv_freq":
                start = {"query": 0, "key": 3}[name]
                self.packed.data[start : start + 3].copy_(tensor)


def config(quantization=None, use_mla=False, is_moe=False, load_format="auto"):
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization, use_mla=use_mla, is_moe=is_moe),
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_the_loader_is_asked_without_writing_anything():
    model, copy = Model(), torch.Tensor.copy_
    check_loader(model, {"query": torch.ones(3, 4), "key": torch.ones(3, 4)})
    assert not model.packed.any()
    assert torch.Tensor.copy_ is copy
    assert torch.zeros(2).copy_(torch.ones(2)).all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("value", torch.ones(3, 4), "Model of vLLM does not take value .*KeyError"),
        ("query", torch.ones(5, 4), r"does not take query .*\(3, 4\) for \(5, 4\)"),
        ("norm", torch.ones(4), "norm: vLLM computes with other values than it loads"),
    ],
)
def test_what_the_loader_cannot_overwrite_is_refused_by_name(name, tensor, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        check_loader(model, {name: tensor})
    assert not model.packed.any()
    assert not model.norm.any()
    assert torch.zeros(2).copy_(torch.ones(2)).all()


def test_what_the_loader_leaves_out_is_warned_of_where_all_layers_are_there(recwarn):
    check_loader(Model(), {"rotary.inv_freq": torch.ones(2)}, all_layers=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"vLLM loads no rotary\.inv_freq"):
        check_loader(Model(), {"query": torch.ones(3, 4), "rotary.inv_freq": torch.ones(2)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp8"}, r"quantised \(fp8\)"),
        ({"use_mla": True}, "latent attention"),
        ({"is_moe": True}, "experts"),
        ({"load_format": "dummy"}, "load_format 'dummy'"),
    ],
)
def test_engines_that_compute_with_other_tensors_are_refused(settings, message):
    check_engine(config(), Model())
    with pytest.raises(ValueError, match=message):
        check_engine(config(**settings), Model())


def test_packed_products_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].cpu_linear = nn.functional.linear
    check_engine(config(), model)
    model[1].cpu_linear = lambda x, weight, bias: x
    with pytest.raises(ValueError, match="packs weights"):
        check_engine(config(), model)
