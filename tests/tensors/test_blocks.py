"""Blocks and linear maps by name: the layer names of the architectures that the recipes train."""

import pytest

from dpp_lightning.tensors.blocks import block_of, is_linear_map


@pytest.mark.parametrize(
    ("name", "shape", "block", "linear"),
    [
        ("encoder.layer.7.attention.self.query.weight", (384, 384), "encoder.layer.7.", True),  # BERT
        ("encoder.layer.7.attention.self.query.bias", (384,), "encoder.layer.7.", False),
        ("layers.11.mlp.down_proj.weight", (64, 256), "layers.11.", True),  # Qwen2, Llama
        ("layers.11.input_layernorm.weight", (64,), "layers.11.", False),
        ("h.0.attn.c_attn.weight", (768, 2304), "h.0.", True),  # GPT-2
        ("blocks.3.mlp.fc1.weight", (256, 64), "blocks.3.", True),  # timm's ViT
        ("patch_embed.proj.weight", (64, 3, 4, 4), None, False),
        ("embeddings.word_embeddings.weight", (30522, 384), None, False),
        ("classifier.weight", (2, 384), None, False),
        ("path.0.weight", (2, 2), None, False),  # ends in h, and is no block
    ],
)
def test_names_tell_blocks_and_linear_maps(name, shape, block, linear):
    assert block_of(name) == block
    assert is_linear_map(name, shape) is linear
