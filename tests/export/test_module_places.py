"""Modules that a model holds elsewhere than under their name alone are saved with what holds them, or refused."""

import copy

import pytest
import torch
from peft_adapters import loaded, moved
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dpp_lightning import prune
from dpp_lightning.export.module_places import replaceable, shared_modules
from dpp_lightning.export.peft_adapter import make_adapter


class Listed(nn.Module):
    """Runs over a list of its maps, as the heads of Mask2Former do."""

    def __init__(self, make):
        super().__init__()
        self.layers = [make(), make()]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config, shared=False):
        super().__init__(config)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = Listed(lambda: Listed(lambda: nn.Linear(4, 4)))
        if shared:
            self.last.weight = self.first.weight
        self.post_init()

    def forward(self, input_ids=None, x=None, **kwargs):
        return self.last(self.head(self.first(x)))


def make(shared=False):
    torch.manual_seed(0)
    base = moved(Model(PreTrainedConfig(), shared).eval())
    return base, Model(PreTrainedConfig(), shared).to("meta"), prune(base, moved(base), "lowrank", rank=4)


@torch.no_grad()
def test_modules_in_a_plain_list_are_saved_with_what_holds_the_list(tmp_path):
    base, outline, delta = make()
    assert replaceable(base, "head.0.1") == "head"
    assert replaceable(base, "first") == "first"
    adapter = make_adapter(delta.contents, outline, base.state_dict())
    assert (set(adapter.ranks), adapter.saved_modules) == ({"first", "last"}, ("head",))
    adapter.write(tmp_path)
    adapted, x, changed = loaded(base, tmp_path), torch.randn(2, 4), copy.deepcopy(base)
    for layers in (adapted.base_model.model.head.modules_to_save["default"], changed.head):
        assert layers.layers[0] is layers.get_submodule("0")
    delta.apply_(changed)
    torch.testing.assert_close(adapted(x=x), changed(x=x), atol=1e-5, rtol=1e-4)


def test_a_map_with_the_weight_of_another_is_refused():
    """peft would change one of them alone."""
    base, _, delta = make(shared=True)
    assert shared_modules(base) == {"first", "last"}
    with pytest.raises(ValueError, match="first is in several places of the model"):
        make_adapter(delta.contents, base, base.state_dict())
