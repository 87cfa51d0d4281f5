"""A trainer's checkpoint as the fine-tuned model: names and class of the model's files, and which copy is meant."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.cli import main

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}


def perturbed(model, scale=0.01):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def checkpoint(path, **models):
    """A Lightning checkpoint of a module with these attributes."""
    holder = nn.Module()
    for name, model in models.items():
        setattr(holder, name, model)
    torch.save({"state_dict": holder.state_dict(), "pytorch-lightning_version": "2.6.6"}, path)
    return path


def run(command, *arguments, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return main([command, *map(str, arguments), *words])


def refusal(capsys, *arguments, **options):
    assert run("prune", *arguments, method="dare", **options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dpp prune: error: ")
    return error


@pytest.fixture
def qwen(tmp_path):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    return base, perturbed(base), tmp_path


def test_of_a_model_and_its_average_one_must_be_chosen(qwen, capsys):
    base, tuned, place = qwen
    path = checkpoint(place / "x.ckpt", model=tuned, ema_model=perturbed(tuned))
    error = refusal(capsys, place / "base", path, output=place / "delta")
    assert "more than one Qwen2ForCausalLM" in error
    assert "--prefix" in error
    assert "'ema_model.'" in error
    assert "'model.'" in error
    assert not (place / "delta").exists()
    expected = prune(base, tuned, "dare", 0.5).to_bytes()[0]
    for prefix, equal in (("model.", True), ("ema_model", False)):
        output = place / f"delta-{prefix}"
        assert run("prune", place / "base", path, method="dare", pruning_rate=0.5, prefix=prefix, output=output) == 0
        assert ((output / "delta_model.safetensors").read_bytes() == expected) is equal
        assert run("apply", place / "base", output, output=place / f"dense-{prefix}") == 0
        dense = load_file(place / f"dense-{prefix}" / "model.safetensors")
        assert set(dense) == set(load_file(place / "base" / "model.safetensors"))
    assert "no tensor under the prefix 'net.'" in refusal(
        capsys, place / "base", path, prefix="net", output=place / "no"
    )


@pytest.mark.parametrize("base_class", [BertModel, BertForMaskedLM])
def test_a_classifier_with_other_labels_gives_a_folder_that_loads(tmp_path, base_class):
    torch.manual_seed(0)
    base = base_class(BertConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    classifier = BertForSequenceClassification(BertConfig(**SIZES, num_labels=5))
    classifier.bert.load_state_dict(getattr(base, "bert", base).state_dict(), strict=False)
    tuned = perturbed(classifier).eval()
    path = checkpoint(tmp_path / "x.ckpt", model=tuned)
    assert run("prune", tmp_path / "base", path, method="dare", pruning_rate=0, output=tmp_path / "delta") == 0
    assert run("apply", tmp_path / "base", tmp_path / "delta", output=tmp_path / "dense") == 0
    dense, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(dense) is BertForSequenceClassification
    ids = torch.arange(6).reshape(1, 6)
    assert torch.allclose(dense.eval()(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-6)


def test_a_head_of_the_users_own_is_carried(tmp_path):
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    tuned = perturbed(base)
    path = checkpoint(tmp_path / "x.ckpt", encoder=tuned, head=nn.Linear(16, 7))
    delta = prune(tmp_path / "base", path, "dare", 0.5)
    assert set(delta.carried) == {"head.weight", "head.bias"}
    assert delta.tensors.keys() == prune(base, tuned, "dare", 0.5).tensors.keys()


def test_adapters_are_named_with_the_way(qwen, capsys):
    _base, tuned, place = qwen
    state = {f"model.{name}": tensor for name, tensor in tuned.state_dict().items()}
    state["model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 16)
    torch.save({"state_dict": state}, place / "x.ckpt")
    assert "dpp export merges them" in refusal(capsys, place / "base", place / "x.ckpt", output=place / "delta")
    (place / "adapter").mkdir()
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, place / "adapter" / "adapter_model.safetensors")
    (place / "adapter" / "adapter_config.json").write_text("{}")
    error = refusal(capsys, place / "base", place / "adapter", output=place / "delta")
    assert "is a PEFT adapter" in error
    assert "merge_and_unload()" in error
    with pytest.raises(ValueError, match="PEFT adapter"):
        prune(place / "base", place / "adapter", "dare", 0.5)


def test_a_model_saved_with_fused_experts_is_told_from_one_saved_one_by_one(tmp_path, capsys):
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    tuned = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    save_file(tuned.state_dict(), tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    error = refusal(capsys, tmp_path / "base", tmp_path / "tuned", output=tmp_path / "delta")
    assert "experts in one tensor" in error
    assert "save_pretrained" in error
    path = checkpoint(tmp_path / "x.ckpt", model=tuned)  # in memory they are one tensor, which is known of checkpoints
    expected = prune(base, tuned, "dare", 0.5).to_bytes()[0]
    assert prune(tmp_path / "base", path, "dare", 0.5).to_bytes()[0] == expected


@pytest.mark.parametrize("method", ["dare", "magnitude", "importance", "struct-dare"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nothing_is_rounded_at_rate_0(tmp_path, dtype, method):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)).to(dtype)
    tuned = perturbed(base, scale=0.05)
    target = copy.deepcopy(base)
    delta = prune(base, tuned, method, 0.0)
    delta.save_pretrained(tmp_path / "delta")
    SparseDelta.from_pretrained(tmp_path / "delta").apply_(target)
    for a, b in zip(target.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(a, b)
