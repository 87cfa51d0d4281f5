"""Blocks and linear maps by name: the names of real models, in their files and in memory, and patterns for others."""

import pytest

from dpp_lightning.tensors.blocks import block_of, is_linear_map, weights_of_bias

# A tensor's name as its block, and the rest after a bar.
IN_BLOCKS = {
    "BERT": "bert.encoder.layer.7.|attention.self.query.weight",
    "Llama": "model.layers.11.|mlp.down_proj.weight",
    "GPT-2": "transformer.h.0.|attn.c_attn.weight",
    "GPT-NeoX": "gpt_neox.layers.3.|attention.query_key_value.weight",
    "DistilBERT": "distilbert.transformer.layer.1.|ffn.lin1.weight",
    "ALBERT": "albert.encoder.albert_layer_groups.0.albert_layers.0.|ffn.weight",
    "T5": "encoder.block.3.|layer.1.DenseReluDense.wi.weight",
    "T5 decoder": "decoder.block.3.|layer.2.DenseReluDense.wo.weight",
    "BART": "model.decoder.layers.2.|encoder_attn.q_proj.weight",
    "Whisper": "model.encoder.layers.2.|fc1.weight",
    "XLM": "transformer.attentions.2.|q_lin.weight",
    "Funnel": "funnel.encoder.blocks.0.1.|attention.q_head.weight",
    "LXMERT": "lxmert.encoder.x_layers.0.|visual_attention.att.query.weight",
    "ViT of timm": "blocks.3.|mlp.fc1.weight",
    "CaiT of timm": "blocks_token_only.0.|attn.q.weight",
    "EfficientNet of timm": "blocks.2.1.|conv_pw.weight",
    "ViT of torchvision": "encoder.layers.encoder_layer_7.|mlp.0.weight",
    "Swin of torchvision": "features.5.3.|attn.qkv.weight",
    "Swin": "swin.encoder.layers.2.blocks.5.|attention.self.query.weight",
    "Swin, between stages": "swin.encoder.layers.2.|downsample.reduction.weight",
    "ConvNeXt": "convnext.encoder.stages.2.layers.5.|pwconv1.weight",
    "ConvNeXt of timm": "stages.2.blocks.5.|mlp.fc1.weight",
    "ResNet": "resnet.encoder.stages.1.layers.2.|layer.0.convolution.weight",
    "ResNet of torchvision": "layer2.3.|conv1.weight",
    "ResNet's first of a stage": "layer2.0.|downsample.0.weight",
    "PVT": "pvt.encoder.block.2.1.|mlp.dense1.weight",
    "MobileViT": "mobilevit.encoder.layer.2.transformer.layer.1.|intermediate.dense.weight",
    "NesT of timm": "levels.2.transformer_encoder.7.|mlp.fc1.weight",
    "PiT of timm": "transformers.1.blocks.0.|attn.qkv.weight",
    "CLIP": "text_model.encoder.layers.3.|self_attn.q_proj.weight",
    "open_clip": "visual.transformer.resblocks.3.|attn.in_proj_weight",
    "Qwen2-VL": "visual.blocks.3.|attn.qkv.weight",
    "LLaVA": "model.language_model.layers.3.|self_attn.q_proj.weight",
    "wav2vec2": "wav2vec2.encoder.layers.3.|attention.k_proj.weight",
    "Perceiver": "perceiver.encoder.self_attends.3.|attention.self.query.weight",
    "Mamba": "backbone.layers.3.|mixer.in_proj.weight",
    "RWKV": "rwkv.blocks.3.|attention.key.weight",
    "Mixtral's files": "model.layers.3.|block_sparse_moe.experts.5.w1.weight",
    "LongCat": "model.layers.3.|mlps.1.up_proj.weight",
    "UNet of diffusers": "down_blocks.1.attentions.0.|transformer_blocks.2.attn1.to_q.weight",
    "SD3 of diffusers": "transformer_blocks.3.|attn.to_q.weight",
    "torch.nn.Transformer": "encoder.layers.3.|self_attn.out_proj.weight",
    "a scale of the block's own": "vit.layers.3.|lambda_1",
    "any front": "module._forward_module.a.b.layers.3.|x.y.weight",
    "no front": "layers.3.|x.weight",
    "a module": "model.layers.3.|",
}
OUTSIDE = (
    "model.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
    "patch_embed.proj.weight",
    "classifier.weight",
    "classifier.0.weight",
    "path.0.dense.weight",  # ends in h, and is no block
    "sub_h.0.dense.weight",
    "bbox_predictor.layers.1.weight",  # a layer of a perceptron
    "mask_decoder.output_hypernetworks_mlps.2.layers.0.bias",
    "feature_extractor.conv_layers.3.conv.weight",
    "model.layer_norm.weight",
    "layers.weight",
    "layers",
)


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_the_block_is_the_leading_part_of_the_name(case):
    block, _, rest = IN_BLOCKS[case].partition("|")
    assert block_of(block + rest) == block
    assert block_of(f"some.front.{block}{rest}") == f"some.front.{block}"


@pytest.mark.parametrize("name", OUTSIDE)
def test_other_tensors_are_in_no_block(name):
    assert block_of(name) is None
    assert not is_linear_map(name, (4, 4))


@pytest.mark.parametrize(
    ("pattern", "name", "block"),
    [
        ("tower.cells.*", "tower.cells.3.q.weight", "tower.cells.3."),
        ("tower.cells.*.", "tower.cells.3.q.weight", "tower.cells.3."),
        ("tower.cells.*", "tower.cells.3", None),  # nothing is left inside
        ("tower.cells.*", "a.tower.cells.3.q.weight", None),
        ("tower.cells.*", "model.layers.3.q.weight", None),  # patterns are in place of what is known
        ("*", "3.weight", "3."),
        ("net.[0-9]", "net.3.weight", "net.3."),
        ("net.stage?.*", "net.stage1.4.q.weight", "net.stage1.4."),
        ("head.layers.*", "head.layers.1.weight", "head.layers.1."),
    ],
)
def test_a_pattern_tells_the_block_part_by_part(pattern, name, block):
    assert block_of(name, [pattern]) == block
    assert is_linear_map(name, (4, 4), [pattern]) is (block is not None)


def test_of_several_patterns_the_longest_match_counts():
    for patterns in (["a.*", "a.*.cells.*"], ["a.*.cells.*", "a.*"]):
        assert block_of("a.0.cells.2.weight", patterns) == "a.0.cells.2."
        assert block_of("a.0.norm.weight", patterns) == "a.0."


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.self_attn.q_proj.weight", (4, 4)),
        ("h.0.attn.c_attn.weight", (4, 12)),
        ("layers.0.mlp.gate.weight", (8, 4)),  # the router of a mixture
        ("encoder.layers.0.self_attn.in_proj_weight", (12, 4)),
        ("layers.0.mlp.experts.gate_up_proj", (8, 4, 16)),
        ("layers.0.feed_forward.experts.down_proj", (8, 16, 4)),
        ("layers.0.mlp.shared_experts.up_proj", (2, 16, 4)),
        ("layers.0.block_sparse_moe.input_linear.weight", (8, 16, 4)),
        ("layers.0.mlp.experts.fc1.weight", (8, 4, 16)),
        ("layers.0.moe.gate_proj.weight", (8, 16, 4)),
        ("layers.0.mlp.experts.w13_weight", (8, 4, 16)),
        ("layers.0.mlp.experts.3.down_proj.weight", (16, 4)),
        ("blocks.0.ffn.experts.mlp.w1", (64, 4)),
        ("encoder.blocks.0.1.attention.r_kernel", (8, 2, 4)),
        ("transformer.layer.0.rel_attn.q", (8, 2, 4)),
        ("layers.0.attn.q_proj.lora_A.weight", (2, 4)),
        ("layers.0.attention.gru_rel_pos_linear.weight", (8, 4)),
        ("decoder.layers.0.self_attn.relative_pos_embeddings.weight", (8, 4)),  # a Linear of ProphetNet
    ],
)
def test_linear_maps_in_blocks(name, shape):
    assert is_linear_map(name, shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.self_attn.q_proj.bias", (4,)),
        ("layers.0.input_layernorm.weight", (4,)),
        ("layers.0.self_attn.q_norm.weight", (2, 4)),
        ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8)),
        ("layers.0.self_attn.distance_embedding.weight", (73, 64)),
        ("layers.0.attention.rel_attn_embed.weight", (320, 12)),
        ("blocks.0.attn.rel_pos_h", (27, 64)),
        ("layers.0.blocks.1.attention.self.relative_position_bias_table", (169, 4)),
        ("blocks.0.attn.attention_biases", (8, 49)),
        ("layers.0.mixer.A_log", (64, 16)),
        ("layers.0.mixer.conv1d.weight", (64, 1, 4)),
        ("layers.0.mlp.experts.gate_up_proj_bias", (8, 16)),
        ("layers.0.conv.pointwise_conv1.weight", (8, 4, 1)),
        ("layer1.0.conv1.weight", (8, 4, 1, 1)),
        ("stages.0.blocks.0.conv_dw.weight", (8, 1, 7, 7)),
        ("patch_embed.weight", (8, 4)),
        ("head.weight", (8, 4)),
    ],
)
def test_tables_norms_convolutions_and_biases_are_no_linear_maps(name, shape):
    assert not is_linear_map(name, shape)


@pytest.mark.parametrize(
    ("bias", "weight"),
    [
        ("layers.0.q.bias", "layers.0.q.weight"),
        ("layers.0.mlp.experts.down_proj_bias", "layers.0.mlp.experts.down_proj"),
        ("layers.0.self_attn.in_proj_bias", "layers.0.self_attn.in_proj_weight"),
    ],
)
def test_a_bias_names_its_weight(bias, weight):
    assert weight in weights_of_bias(bias)
    assert weights_of_bias(weight) == ()
