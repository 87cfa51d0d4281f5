"""Fine-tuned weights under the names of memory: names and class of the model's files, and which copy is meant."""

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
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
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


def test_a_model_saved_with_fused_experts_is_read_where_a_configuration_tells_of_it(tmp_path, capsys):
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    tuned = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    save_file(tuned.state_dict(), tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    path = checkpoint(tmp_path / "x.ckpt", model=tuned)  # in memory they are one tensor, which is known of checkpoints
    expected = prune(base, tuned, "dare", 0.5).to_bytes()[0]
    for source in (path, tmp_path / "tuned"):
        assert prune(tmp_path / "base", source, "dare", 0.5).to_bytes()[0] == expected
    for name in ("base", "tuned"):
        (tmp_path / name / "config.json").unlink()
    error = refusal(capsys, tmp_path / "base", tmp_path / "tuned", output=tmp_path / "delta")
    assert "experts in one tensor" in error
    assert "save_pretrained" in error


TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOWER |= {"image_size": 16, "patch_size": 8}
RENAMED = {
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **SIZES, "num_key_value_heads": 2},
            vision_config={"model_type": "clip_vision_model", **TOWER, "projection_dim": 16},
        )
    ),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**TOWER, num_labels=3)),
    "nomic": lambda: NomicBertModel(NomicBertConfig(**SIZES)),
}


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "alone.bin", "alone.safetensors"])
def test_a_folder_with_the_names_of_memory_is_read_as_one_with_those_of_the_files(tmp_path, name, file):
    """As ``torch.save(model.state_dict(), …)`` and Accelerate's ``save_model`` write it, with config.json or without."""
    torch.manual_seed(0)
    base = RENAMED[name]()
    tuned = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "files")
    folder = tmp_path / "memory"
    folder.mkdir()
    state = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    assert not state.keys() <= load_file(tmp_path / "files" / "model.safetensors").keys()
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file)
    expected = prune(tmp_path / "base", tmp_path / "files", "dare", 0.5).to_bytes()[0]
    source = folder if "model" in file else folder / file
    assert prune(tmp_path / "base", source, "dare", 0.5).to_bytes()[0] == expected
    assert run("prune", tmp_path / "base", source, method="dare", pruning_rate=0.5, output=tmp_path / "delta") == 0
    assert (tmp_path / "delta" / "delta_model.safetensors").read_bytes() == expected
    assert run("apply", tmp_path / "base", tmp_path / "delta", output=tmp_path / "dense") == 0
    assert (
        load_file(tmp_path / "dense" / "model.safetensors").keys()
        == load_file(tmp_path / "files" / "model.safetensors").keys()
    )
    tuned.config.save_pretrained(folder)
    assert prune(tmp_path / "base", source, "dare", 0.5).to_bytes()[0] == expected


def test_a_new_head_in_a_folder_with_the_names_of_memory_is_carried(tmp_path):
    """The fine-tuned folder's own configuration tells the class and its labels."""
    torch.manual_seed(0)
    base = Dinov2Model(Dinov2Config(**TOWER))
    base.save_pretrained(tmp_path / "base")
    tuned = Dinov2ForImageClassification(Dinov2Config(**TOWER, num_labels=5))
    tuned.dinov2.load_state_dict(perturbed(base).state_dict())
    tuned.save_pretrained(tmp_path / "files")
    tuned.config.save_pretrained(tmp_path / "memory")
    torch.save(tuned.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    delta = prune(tmp_path / "base", tmp_path / "memory", "dare", 0.5)
    assert delta.to_bytes() == prune(tmp_path / "base", tmp_path / "files", "dare", 0.5).to_bytes()
    assert set(delta.carried) == {"classifier.weight", "classifier.bias"}


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
