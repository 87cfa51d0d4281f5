"""Which shapes may differ between a base and a fine-tuned model, and which are those of another model."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dpp_lightning import SparseDelta, prune

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def bert(width=32, labels=2, vocabulary=100, positions=32):
    config = BertConfig(
        hidden_size=width, num_labels=labels, vocab_size=vocabulary, max_position_embeddings=positions, **SMALL
    )
    return BertForSequenceClassification(config)


def vit(size=32, labels=2, channels=3):
    config = ViTConfig(hidden_size=32, image_size=size, patch_size=8, num_labels=labels, num_channels=channels, **SMALL)
    return ViTForImageClassification(config)


def bart(vocabulary=100):
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sizes.items()}
    config = BartConfig(d_model=16, vocab_size=vocabulary, max_position_embeddings=16, **sides)
    model = BartForConditionalGeneration(config)
    nn.init.normal_(model.final_logits_bias)
    return model


def perceptron(width=32, inputs=8, outputs=3):
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width)]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


@pytest.mark.parametrize(
    ("base", "finetuned", "carried"),
    [
        (bert, lambda: bert(labels=3), {"classifier.weight", "classifier.bias"}),
        (bert, lambda: bert(vocabulary=108), set()),
        (lambda: bert(vocabulary=108), bert, set()),
        (vit, lambda: vit(labels=5), {"classifier.weight", "classifier.bias"}),
        (
            vit,
            lambda: vit(size=64, labels=5),
            {"classifier.weight", "classifier.bias", "embeddings.position_embeddings"},
        ),
        (bart, lambda: bart(108), {"final_logits_bias"}),
        (perceptron, lambda: perceptron(outputs=7), {"4.weight", "4.bias"}),
    ],
    ids=["labels", "longer vocabulary", "shorter vocabulary", "classes", "resolution", "logits' bias", "perceptron"],
)
def test_heads_vocabularies_and_positions_may_differ(base, finetuned, carried):
    tuned = finetuned()
    delta = prune(base(), tuned, "dare", 0.0)
    different = {name for name, tensor in delta.carried.items() if tensor.is_floating_point()}
    assert different == carried
    assert isinstance(delta, SparseDelta)
    assert delta.num_kept


@pytest.mark.parametrize(
    ("base", "finetuned", "names"),
    [
        (bert, lambda: bert(16), r"encoder.layer.0"),
        (perceptron, lambda: perceptron(16), r"0.weight \(16, 8\), in the base \(32, 8\); 0.bias \(16,\)"),
        (perceptron, lambda: perceptron(inputs=9), r"\(0.weight \(32, 9\), in the base \(32, 8\)\)"),
        (vit, lambda: vit(channels=4), r"patch_embeddings.projection.weight \(32, 4, 8, 8\), in the base \(32, 3, 8, 8\)"),
        (lambda: nn.ModuleDict({"norm": nn.LayerNorm(8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}),
         lambda: nn.ModuleDict({"norm": nn.LayerNorm(4), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), "norm.weight"),
        (lambda: {"a.weight": torch.ones(4, 4), "b": torch.ones(3)},
         lambda: {"a.weight": torch.ones(4, 4, 1), "b": torch.zeros(3)}, r"a.weight \(4, 4, 1\)"),
    ],
    ids=["width", "width of a perceptron", "inputs", "channels", "norm", "rank"],
)  # fmt: skip
def test_other_models_are_refused_with_names(base, finetuned, names):
    with pytest.raises(ValueError, match=f"(?s)do not have the same layers.*{names}"):
        prune(base(), finetuned(), "dare", 0.9)


def test_a_tensor_that_is_new_on_purpose_is_named():
    tuned = vit(channels=4)
    delta = prune(vit(), tuned, "dare", 0.9, carry=["*.projection.weight"])
    (carried,) = (t for name, t in delta.carried.items() if name.endswith("projection.weight"))
    assert carried.shape == (32, 4, 8, 8)
