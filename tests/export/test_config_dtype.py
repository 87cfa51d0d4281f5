"""dtype in config.json of an export, in the configurations of text and vision too."""

import json

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dpp_lightning.cli import main


def test_configurations_inside_follow_the_dtype_of_the_weights(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path / "first")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "base")
    base = json.loads((tmp_path / "base/config.json").read_text())
    assert [base["dtype"], base["vision_config"]["dtype"], base["text_config"]["dtype"]] == ["bfloat16"] * 3
    state = {f"model.{name}": tensor for name, tensor in model.float().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    arguments = ["export", tmp_path / "last.ckpt", "--config_from", tmp_path / "base", "--output", tmp_path / "dense"]
    assert main([str(argument) for argument in arguments]) == 0
    written = json.loads((tmp_path / "dense/config.json").read_text())
    assert [written["dtype"], written["vision_config"]["dtype"], written["text_config"]["dtype"]] == ["float32"] * 3
    dense = LlavaForConditionalGeneration.from_pretrained(tmp_path / "dense")
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
