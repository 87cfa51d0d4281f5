"""A delta of low rank as a LoRA adapter: what peft makes of it computes as base plus delta does."""

import copy
import json
import re

import pytest
import torch
from peft_adapters import loaded, moved
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.export.adapter_folder import export_adapter
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 99}
TOKENS = {"input_ids": torch.arange(4, 24).reshape(2, 10)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig(**SMALL, vocab_size=99, num_labels=3), TOKENS),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=32), TOKENS),
    "llama": (LlamaForCausalLM, LlamaConfig(**DECODER), TOKENS),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**DECODER), TOKENS),
    "vit": (ViTForImageClassification, ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3), IMAGES),
}


def make(kind):
    """Base and fine-tuned model."""
    cls, config, inputs = MODELS[kind]
    torch.manual_seed(0)
    base = moved(cls(copy.deepcopy(config)).eval(), seed=5)  # biases of a new model are 0
    return base, moved(base), inputs


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_as_base_plus_delta(kind, tmp_path):
    base, tuned, inputs = make(kind)
    delta = prune(base, tuned, "lowrank", rank=4)
    export_adapter(delta, base, tmp_path / "adapter")
    adapted = loaded(base, tmp_path / "adapter")
    plain = logits(base, inputs)
    assert torch.equal(logits(base, inputs), plain)
    with delta.applied(base):
        expected = logits(base, inputs)
    assert (expected - plain).abs().max() > 0.01
    assert torch.allclose(logits(adapted, inputs), expected, atol=2e-5)
    with adapted.disable_adapter():
        assert torch.allclose(logits(adapted, inputs), plain, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_merged_by_peft_it_is_base_plus_delta(kind, tmp_path):
    base, tuned, _ = make(kind)
    delta = prune(base, tuned, "lowrank", rank=4)
    export_adapter(delta, base, tmp_path / "adapter")
    merged = loaded(base, tmp_path / "adapter").merge_and_unload().state_dict()
    delta.apply_(base)
    for name, tensor in base.state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-6), name


def saved(kind, folder):
    """A base and the folders of it and of a delta."""
    base, tuned, inputs = make(kind)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    spec = PruningSpec("lowrank", 0.9, method_settings={"rank": 4})
    prune_checkpoint(str(folder / "base"), str(folder / "tuned"), folder / "delta", spec)
    return base, inputs, SparseDelta.from_pretrained(folder / "delta")


def test_files_suffice_and_the_delta_names_its_base(tmp_path):
    base, inputs, delta = saved("vit", tmp_path)
    adapter = export_adapter(tmp_path / "delta", None, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapter.num_bytes == sum(t.nbytes for t in held.values())
    adapted = loaded(base, tmp_path / "adapter")
    delta.apply_(base)
    assert torch.allclose(logits(adapted, inputs), logits(base, inputs), atol=2e-5)


def test_a_carried_head_is_saved_whole(tmp_path):
    base, tuned, inputs = make("bert")
    bare = {name: t for name, t in base.state_dict().items() if not name.startswith("classifier")}
    delta = prune(bare, tuned.state_dict(), "lowrank", rank=4)
    assert set(delta.carried) == {"classifier.weight", "classifier.bias"}
    fresh = moved(base, seed=9, scale=0.0)
    torch.nn.init.normal_(fresh.classifier.weight, std=3.0)
    export_adapter(delta, fresh, tmp_path / "adapter")
    adapted = loaded(fresh, tmp_path / "adapter")
    delta.apply_(base)
    assert torch.allclose(logits(adapted, inputs), logits(base, inputs), atol=2e-5)
    (note,) = export_adapter(delta, fresh, tmp_path / "maps", lora_only=True).notes
    assert "12 tensors that no LoRA layer has (classifier.weight, " in note  # what matters most is named first


def test_at_an_even_rank_never_worse_than_a_plain_svd(tmp_path):
    base, tuned, _ = make("llama")
    delta = prune(base, tuned, "lowrank", rank=4, spread="even", factors_dtype="float32")
    export_adapter(delta, base, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (4, 4, {})
    modules = [name for name, _ in base.named_modules() if name in settings["target_modules"]]
    assert sorted(settings["target_modules"]) == sorted(modules)
    of_base, of_tuned = base.state_dict(), tuned.state_dict()
    layers = [name.removesuffix(".lora_A.weight") for name in held if name.endswith("lora_A.weight")]
    assert len(layers) == 15
    for layer in layers:
        name = layer.removeprefix("base_model.model.") + ".weight"
        change = (of_tuned[name] - of_base[name]).double()
        left = change - held[f"{layer}.lora_B.weight"].double() @ held[f"{layer}.lora_A.weight"].double()
        assert left.norm() <= torch.linalg.svdvals(change)[4:].norm() * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_halve_the_factors_and_keep_norms_as_they_are(dtype, tmp_path):
    base, tuned, inputs = make("llama")
    delta = prune(base, tuned, "lowrank", rank=4)
    whole = export_adapter(delta, base, tmp_path / "whole")
    half = export_adapter(delta, base, tmp_path / "half", dtype=dtype)
    for name, tensor in half.tensors.items():
        assert tensor.dtype == (getattr(torch, dtype) if ".lora_" in name else torch.float32)
        assert tensor.shape == whole.tensors[name].shape
    delta.apply_(base)
    expected = logits(base, inputs)
    delta.revert_(base)
    assert torch.allclose(logits(loaded(base, tmp_path / "half"), inputs), expected, atol=0.02)


def test_lora_only_has_nothing_but_lora_weights_and_names_what_is_left_out(tmp_path):
    base, tuned, _ = make("bert")
    adapter = export_adapter(prune(base, tuned, "lowrank", rank=4), base, tmp_path / "adapter", lora_only=True)
    assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in adapter.tensors)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None
    assert not settings["lora_bias"]
    assert settings["bias"] == "none"
    (note,) = adapter.notes
    assert "14 biases (" in note
    assert "10 tensors that no LoRA layer has (" in note
    assert "left out" in note
    loaded(base, tmp_path / "adapter")


def test_notes_say_what_other_engines_do_not_load_and_peft_does_not_merge(tmp_path):
    base, tuned, _ = make("qwen2")
    first, second = export_adapter(prune(base, tuned, "lowrank", rank=4), base, tmp_path / "adapter").notes
    assert "biases" in first
    assert "modules saved whole (model.layers.0.input_layernorm" in first
    assert "vLLM" in first
    assert "model.layers.0.mlp.down_proj" in second
    assert "merge_and_unload" in second


def test_convolutions(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    base = moved(ResNetForImageClassification(config).eval(), seed=5)
    delta = prune(base, moved(base), "lowrank", rank=4)
    adapter = export_adapter(delta, base, tmp_path / "adapter")
    assert any(".convolution.lora_A" in name for name in adapter.tensors)
    adapted = loaded(base, tmp_path / "adapter")
    delta.apply_(base)
    assert torch.allclose(logits(adapted, IMAGES), logits(base, IMAGES), atol=2e-5)


def refusal(delta, base, folder, **settings):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        export_adapter(delta, base, folder / "adapter", **settings)
    assert not (folder / "adapter").exists()
    return str(error.value)


def test_deltas_that_are_no_adapter_are_refused_with_the_cure(tmp_path):
    base, tuned, _ = make("bert")
    said = refusal(prune(base, tuned, "dare", 0.9), base, tmp_path)
    assert "method dare" in said
    assert "--method lowrank" in said
    assert "dpp apply" in said
    said = refusal(prune(base, tuned, "lowrank", rank=4, rest=0.9), base, tmp_path)
    assert "sampled rest" in said
    assert "rest=1" in said
    assert "dpp apply" in said
    delta = prune(base, tuned, "lowrank", rank=4)
    assert "force" in refusal(delta, moved(base, seed=8), tmp_path)
    assert "float32, bfloat16, float16" in refusal(delta, base, tmp_path, dtype="int8")
    small = BertForSequenceClassification(BertConfig(**SMALL | {"num_hidden_layers": 1}, vocab_size=99, num_labels=3))
    assert "does not fit" in refusal(delta, small, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        export_adapter(delta, base, tmp_path / "adapter", overwrite=True)


@torch.no_grad()
def test_a_convolution_whose_attributes_a_model_reads_is_saved_whole(tmp_path):
    """peft's layer around it lacks them: Whisper's encoder reads ``self.conv1.stride``."""
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    base = WhisperForConditionalGeneration(config).eval()
    tuned = moved(base)
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 7, 3]])}
    delta = prune(base, tuned, "lowrank", rank=4)
    export_adapter(delta, base, tmp_path / "adapter")
    with delta.applied(base):
        expected = base(**inputs).logits
    torch.testing.assert_close(loaded(base, tmp_path / "adapter")(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_linear_maps_beside_parameters_of_their_module_are_adapted_where_these_are_left_out(tmp_path):
    """A block of ConvNeXt has a scale of its own, so that with it all of the block is saved whole."""
    config = ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, num_labels=3, patch_size=2)
    base = ConvNextForImageClassification(config).eval()
    delta = prune(base, moved(base), "lowrank", rank=2)
    whole = export_adapter(delta, base, tmp_path / "whole")
    assert not any("pwconv" in path for path in whole.ranks)
    adapter = export_adapter(delta, base, tmp_path / "adapter", lora_only=True)
    assert sum("pwconv" in path for path in adapter.ranks) == 4
    assert "16 tensors that no LoRA layer has (" in adapter.notes[0]
    loaded(base, tmp_path / "adapter")(**IMAGES)
    with delta.applied(base):
        expected = base(**IMAGES).logits
    assert torch.allclose(loaded(base, tmp_path / "whole")(**IMAGES).logits, expected, atol=1e-4)


def test_where_all_maps_lie_beside_such_parameters_that_is_said(tmp_path):
    base = MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    delta = prune(base, moved(base), "lowrank", rank=2, include=["*.mixer.*"], outside="revert")
    said = refusal(delta, base, tmp_path)
    assert "A_log" in said
    assert "--lora_only leaves them out" in said
    adapter = export_adapter(delta, base, tmp_path / "adapter", lora_only=True)
    assert {path.rpartition(".")[2] for path in adapter.ranks} == {"in_proj"}  # the weights of the others are read
    assert "12 tensors that no LoRA layer has (" in adapter.notes[0]
    loaded(base, tmp_path / "adapter")(**TOKENS)


def test_another_base_is_named_as_it_was_given(tmp_path):
    base, tuned, _ = make("bert")
    other = tmp_path / "other"
    moved(base, seed=9).save_pretrained(other)
    delta = prune(base, tuned, "lowrank", rank=2)
    with pytest.raises(ValueError, match=f"{re.escape(str(other))} is not the base of this delta"):
        export_adapter(delta, other, tmp_path / "adapter")


def test_what_no_lora_layer_holds_is_refused(tmp_path):
    base, tuned, _ = make("gpt2")
    bare = {name: t for name, t in base.state_dict().items() if not name.endswith("wte.weight")}
    del bare["lm_head.weight"]
    delta = prune(bare, tuned.state_dict(), "lowrank", rank=4)
    assert "tied" in refusal(delta, base, tmp_path)
    moe = MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=2))
    assert "parts of other tensors" in refusal(prune(moe, moved(moe), "lowrank", rank=4), moe, tmp_path)
