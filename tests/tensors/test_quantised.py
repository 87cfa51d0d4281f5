"""Quantised weights are told by what they are, in memory and before a file's values are read; nothing else is."""

import pytest
import torch
from quantised_files import SCHEMES, plain, quantised
from tiny import pair
from torch import nn

from dpp_lightning import prune
from dpp_lightning.tensors.quantised import find_quantised


@pytest.mark.parametrize("scheme", [scheme for scheme, (_, config) in SCHEMES.items() if "quark" not in scheme])
def test_every_scheme_is_told_by_its_tensors_alone(scheme):
    (found,) = find_quantised(quantised(scheme))
    assert found.scheme.startswith(scheme)
    assert len(found.names) == 4, "two projections in two layers, and nothing that is beside their codes"
    assert all("_proj" in name for name in found.names)


@pytest.mark.parametrize(
    "tensors",
    [
        plain(),
        plain(torch.float64),
        {"blocks.0.attention.time_decay": torch.ones(8), "layer_scale": torch.ones(8), "logit_scale": torch.ones(())},
        {
            "q.weight": torch.ones(4, 4),
            "q.weight_scale": torch.ones(4, 1),
            "q.scales": torch.ones(4),
            "q.SCB": torch.ones(4),
        },
        {"q.weight": torch.ones(4, 4), "q.weight_fake_quant.scale": torch.ones(1)}
        | {"q.weight_fake_quant.zero_point": torch.ones(1, dtype=torch.int32)}
        | {"q.weight_fake_quant.fake_quant_enabled": torch.ones(1, dtype=torch.uint8)},
        {"attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8), "attn.masked_bias": torch.tensor(-torch.inf)},
        {"position_ids": torch.arange(8)[None], "bn.num_batches_tracked": torch.tensor(3)},
        {"relative_position_index": torch.ones(16, 16, dtype=torch.int64), "kept": torch.ones(9, dtype=torch.bool)},
        {"quantizer.codebook.weight": torch.ones(4, 4), "quantizer.codes": torch.ones(4, dtype=torch.int64)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_scales_masks_counters_and_observers_are_no_codes(tensors):
    assert find_quantised(tensors) == []


def test_what_a_configuration_declares_makes_packed_integers_codes_under_any_name():
    tensors = plain() | {"a.secret": torch.ones(4, 4, dtype=torch.uint8), "a.b": torch.ones(4, dtype=torch.uint8)}
    assert find_quantised(tensors) == []
    assert find_quantised(tensors, declared="newquant") == [("newquant (uint8)", ["a.secret"])]
    assert find_quantised(plain(), declared="newquant") == []


class Int8Tensor(torch.Tensor):
    """As quantising libraries make them: it shows a float's dtype and holds integers."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_a_class_that_hides_its_integers_is_found():
    codes, scale = torch.ones(4, 4, dtype=torch.int8), torch.ones(4)
    (found,) = find_quantised({"q.weight": Int8Tensor(codes, scale), "k.weight": Int8Tensor(codes.float(), scale)})
    assert found.names == ["q.weight"]
    assert found.scheme.endswith("Int8Tensor")


@pytest.mark.parametrize("side", ["base", "fine-tuned model"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_modules_and_state_dicts_are_refused_on_either_side(side, dtype):
    models = pair()
    number = ("base", "fine-tuned model").index(side)
    layer = models[number].layers[1][0]
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(dtype), requires_grad=False)
    for sources in (models, [model.state_dict() for model in models]):
        with pytest.raises(ValueError, match=r"is quantised \(1 tensors in \w+: layers.1.0.weight\)") as error:
            prune(*sources, "dare", 0.9)
        assert "\n" not in str(error.value)
