"""Modules whose weight a model reads itself, or whose output is not linear in it, go into an adapter whole."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_adapters import loaded, moved
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BitConfig,
    BitForImageClassification,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MobileBertConfig,
    MobileBertForMaskedLM,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RwkvConfig,
    RwkvForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WavLMConfig,
    WavLMForCTC,
)

from dpp_lightning import prune
from dpp_lightning.export.adapter_folder import export_adapter
from dpp_lightning.export.lora_layers import takes_lora

HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**HEADS, "hidden_size": 32, "intermediate_size": 48}
TOKENS = {"input_ids": torch.arange(4, 24).reshape(2, 10)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
WAVES = {"input_values": torch.linspace(-9, 9, 800).sin().reshape(2, 400)}
CASES = {  # class, configuration, inputs, the tensors that change, the end of the modules that are saved whole
    "siglip": (
        SiglipVisionModel, SiglipVisionConfig(**SMALL, image_size=32, patch_size=16), IMAGES,
        ["*out_proj*", "*fc1*"], "head.attention.out_proj",
    ),
    "bit": (
        BitForImageClassification,
        BitConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, num_labels=3), IMAGES,
        ["*conv*", "classifier*"], "conv1",
    ),
    "mobilebert": (
        MobileBertForMaskedLM,
        MobileBertConfig(**SMALL, vocab_size=99, embedding_size=16, intra_bottleneck_size=48, true_hidden_size=48),
        TOKENS, ["cls.predictions.dense.weight", "*attention.output.dense*"], "cls.predictions.dense",
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig(
            **SMALL, num_key_value_heads=2, head_dim=8, vocab_size=99, num_local_experts=2, intermediate_size_mlp=48,
            interleave_moe_layer_step=2,
        ), TOKENS, ["*router*", "*q_proj*"], "feed_forward.router",
    ),
    "mobilenet v1": (
        MobileNetV1ForImageClassification, MobileNetV1Config(depth_multiplier=0.25, num_labels=3), IMAGES,
        ["*convolution*", "classifier*"], "convolution",
    ),
    "mobilenet v2": (
        MobileNetV2ForImageClassification, MobileNetV2Config(depth_multiplier=0.35, num_labels=3), IMAGES,
        ["*conv_1x1.convolution*", "*layer.3.*convolution*", "classifier*"], "convolution",
    ),
    "wavlm": (
        WavLMForCTC,
        WavLMConfig(
            **SMALL, vocab_size=20, conv_dim=[16, 16], conv_stride=[2, 2], conv_kernel=[3, 3],
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ), WAVES, ["*_proj.weight", "*dense*"], "attention.q_proj",
    ),
    "rwkv": (
        RwkvForCausalLM, RwkvConfig(hidden_size=32, num_hidden_layers=4, rescale_every=2, vocab_size=99), TOKENS,
        ["*attention*weight", "*feed_forward*weight"], "attention.output",
    ),
}  # fmt: skip


def make(kind):
    """Base, delta, inputs, and the end of the modules that are to be saved whole."""
    cls, config, inputs, include, whole = CASES[kind]
    torch.manual_seed(0)
    base = moved(cls(config).eval(), seed=5, scale=0.02)
    return base, prune(base, moved(base), "lowrank", rank=4, include=include, outside="revert"), inputs, whole


@torch.no_grad()
def output(model, inputs):
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.pooler_output


@pytest.mark.parametrize("kind", CASES)
def test_what_takes_no_lora_layer_is_saved_whole_and_computes_as_base_plus_delta(kind, tmp_path):
    base, delta, inputs, whole = make(kind)
    adapter = export_adapter(delta, base, tmp_path / "adapter")
    assert any(path.endswith(whole) for path in adapter.saved_modules)
    assert not any(path.endswith(whole) for path in adapter.ranks)
    adapted = output(loaded(base, tmp_path / "adapter"), inputs)
    changed = copy.deepcopy(base)  # before a pass: RWKV scales its weights in one
    delta.apply_(changed)
    expected = output(changed, inputs)
    assert (expected - output(base, inputs)).abs().max() > 1e-3
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "bit", "mobilebert", "llama4", "mobilenet v1"])
def test_lora_alone_leaves_it_out_and_says_so(kind, tmp_path):
    base, delta, inputs, whole = make(kind)
    adapter = export_adapter(delta, base, tmp_path / "adapter", lora_only=True)
    assert "tensors that no LoRA layer has (" in adapter.notes[0]
    assert not any(path.endswith(whole) for path in adapter.ranks)
    adapted = output(loaded(base, tmp_path / "adapter"), inputs)
    for path in adapter.ranks:
        a, b = (adapter.tensors[f"base_model.model.{path}.lora_{side}.weight"].flatten(1) for side in "AB")
        weight = base.get_submodule(path).weight.data
        weight += (b @ a).view_as(weight)
    torch.testing.assert_close(adapted, output(base, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=99)), 4),
        (FalconForCausalLM(FalconConfig(**HEADS | {"num_hidden_layers": 1}, hidden_size=32, vocab_size=99)), 4),
    ],
    ids=["reads weights where a switch is on that is off", "multiplies with the weight in a class of its own"],
)
def test_what_computes_rightly_with_a_lora_layer_takes_one(model, layers, tmp_path):
    delta = prune(model.eval(), moved(model), "lowrank", rank=2, include=["h.*"], outside="revert")
    adapter = export_adapter(delta, model, tmp_path / "adapter")
    assert len(adapter.ranks) == layers
    adapted = output(loaded(model, tmp_path / "adapter"), TOKENS)
    with delta.applied(model):
        torch.testing.assert_close(adapted, output(model, TOKENS), atol=1e-5, rtol=1e-4)


def test_bloom_that_computes_slowly_but_exactly_reads_its_weights():
    config = BloomConfig(
        hidden_size=32, n_layer=1, n_head=4, vocab_size=99, pretraining_tp=2, slow_but_exact=True
    )  # fmt: skip
    model = BloomForCausalLM(config)
    assert not takes_lora(model, "transformer.h.0.self_attention.dense")
    assert takes_lora(model, "transformer.h.0.self_attention.query_key_value")


def test_a_convolution_of_timm_that_pads_by_itself_takes_a_lora_layer_of_its_own_class():
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(timm_layers.Conv2dSame(3, 5, 3, stride=2))
    assert takes_lora(model, "0")
    config = LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    output = adapted(IMAGES["pixel_values"])
    torch.testing.assert_close(adapted.merge_and_unload()(IMAGES["pixel_values"]), output, atol=1e-5, rtol=1e-4)


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Uses(nn.Module):
    """Asks the type of its maps' weights and the like, which changes nothing, or reads their values."""

    def __init__(self):
        super().__init__()
        self.asked, self.read, self.given, self.shown = (nn.Linear(4, 4) for _ in range(4))
        self.listed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.square = Squared(4, 4)
        self.dilated, self.plain = nn.Conv1d(4, 4, 3, dilation=2), nn.Conv1d(4, 4, 3)
        self.normed = parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        nn.init.zeros_(self.asked.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.bias is not None and callable(self.shown.to):
            x = x.to(self.asked.weight.dtype)
        width = self.shown.weight.shape[0] + self.shown.out_features
        return self.shown(self.asked(x)) @ self.read.weight.t() + torch.vmap(self.given)(x) * width


class Outer(nn.Module):
    """Reads a weight two levels below itself, and one of the items of a list."""

    def __init__(self):
        super().__init__()
        self.inner, self.blocks = Uses(), nn.ModuleList([Uses()])

    def forward(self, x):
        for block in self.blocks:
            x = x * block.plain.bias
        return x * self.inner.asked.weight + self.inner.listed[0].weight


def test_what_a_model_asks_and_what_it_reads():
    model = Uses()
    taken = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d) and takes_lora(model, n)}
    assert taken == {"asked", "shown", "listed.0", "listed.1", "plain"}


def test_outer_modules_read_too():
    model = Outer()
    taken = [
        name
        for name in (
            "inner.asked",
            "inner.listed.0",
            "inner.listed.1",
            "inner.shown",
            "blocks.0.plain",
            "blocks.0.shown",
        )
        if takes_lora(model, name)
    ]
    assert taken == ["inner.shown", "blocks.0.shown"]  # any item of a list may be the one that is read
