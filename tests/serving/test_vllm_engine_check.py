"""Servers of vLLM that compute with other tensors than the base's files hold are refused, with the reason."""

from types import SimpleNamespace

import pytest
from torch import nn

from dpp_lightning.serving.vllm.engine_check import check_engine


def config(quantization=None, use_mla=False, is_moe=False, load_format="auto"):
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization, use_mla=use_mla, is_moe=is_moe),
        load_config=SimpleNamespace(load_format=load_format),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "fp8"}, r"quantised \(fp8\)"),
        ({"use_mla": True}, "latent attention"),
        ({"is_moe": True}, "experts"),
        ({"load_format": "dummy"}, "load_format 'dummy'"),
    ],
)
def test_a_kind_of_server_is_refused(settings, message):
    check_engine(config(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        check_engine(config(**settings), nn.Linear(2, 2))


def test_packed_products_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].cpu_linear = nn.functional.linear
    check_engine(config(), model)
    model[1].cpu_linear = lambda x, weight, bias: x
    with pytest.raises(ValueError, match="packs weights"):
        check_engine(config(), model)
