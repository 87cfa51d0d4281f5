"""Which modules of a model are sharded as units."""

import pytest
import timm
import torch
from transformers import AlbertConfig, AlbertModel, Qwen2Config, Qwen2Model, T5Config, T5Model

from dpp_lightning.tasks.common.sharding import block_modules

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda: Qwen2Model(Qwen2Config(**SMALL, num_key_value_heads=2)), ["Qwen2DecoderLayer"] * 3),
        (
            lambda: T5Model(T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=9)),
            ["T5Block"] * 4,
        ),
        (lambda: AlbertModel(AlbertConfig(**SMALL, embedding_size=8)), ["AlbertLayer"]),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), ["SwinTransformerBlock"] * 12),
        (lambda: timm.create_model("resnet18"), ["BasicBlock"] * 8),
        (lambda: timm.create_model("efficientnet_b0"), ["DepthwiseSeparableConv"] + ["InvertedResidual"] * 15),
    ],
)
def test_units_are_blocks_that_hold_no_further_blocks(make, kinds):
    with torch.device("meta"):
        assert [type(block).__name__ for block in block_modules(make())] == kinds


def test_lists_without_a_forward_and_layers_without_parts_are_no_units():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])])
    model.head = torch.nn.Module()
    model.head.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert block_modules(model) == [model.blocks[0][0]]
