"""Tensors of transformers models as their files hold them: renamed, in parts, joined; read and written in place."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    CamembertConfig,
    CamembertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.tensors.names import canonical_tensors, named_tensors

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOWER = {**SIZES, "image_size": 32, "patch_size": 8}

MODELS = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, vocab_size=50, num_key_value_heads=2, num_local_experts=4)
    ),
    "nomic": lambda: NomicBertModel(NomicBertConfig(**SIZES, vocab_size=50)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**TOWER, num_labels=3)),
    "siglip": lambda: SiglipModel(
        SiglipConfig(text_config={**SIZES, "vocab_size": 50, "projection_size": 32}, vision_config=TOWER)
    ),
    "camembert": lambda: CamembertForMaskedLM(CamembertConfig(**SIZES, vocab_size=50)),  # its head comes first
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]()


def tuned(base):
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", MODELS)
def test_a_module_has_the_names_and_values_of_the_files_that_it_saves(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert {n.saved for n in named_tensors(model)} == set(files)
    assert same(canonical_tensors(model), canonical_tensors(files))
    loaded = type(model).from_pretrained(tmp_path)
    assert same(canonical_tensors(loaded), canonical_tensors(files))


def test_names_of_the_towers_of_a_model_stay():
    names = set(canonical_tensors(make("siglip")))
    assert {n.partition(".")[0] for n in names} == {"text_model", "vision_model", "logit_scale", "logit_bias"}


@pytest.mark.parametrize("name", MODELS)
def test_a_delta_is_applied_in_place_and_taken_off_bit_for_bit(name):
    base = make(name)
    finetuned, target = tuned(base), copy.deepcopy(base)
    delta = prune(base, finetuned, "dare", 0.5)
    delta.apply_(target)
    changed = dict(canonical_tensors(target))
    for key, kept in delta.tensors.items():
        expected = canonical_tensors(base)[key].detach().clone().reshape(-1)
        expected[kept.indices.long()] += kept.values / delta.q
        assert torch.equal(changed[key].detach().reshape(-1), expected)
    delta.revert_(target)
    assert same(target.state_dict(), base.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_modules_and_their_state_dicts_give_one_delta(name):
    base = make(name)
    finetuned = tuned(base)
    expected = prune(base, finetuned, "dare", 0.5).to_bytes()[0]
    assert prune(base, finetuned.state_dict(), "dare", 0.5).to_bytes()[0] == expected
    assert prune(base.state_dict(), finetuned, "dare", 0.5).to_bytes()[0] == expected
    of_state_dicts = prune(base.state_dict(), finetuned.state_dict(), "dare", 0.5)  # nothing tells what they are of
    with of_state_dicts.applied(target := copy.deepcopy(base)):
        assert not same(target.state_dict(), base.state_dict())
    assert same(target.state_dict(), base.state_dict())


@pytest.mark.parametrize("name", ["mixtral", "nomic"])
def test_gradients_of_parts_and_of_joined_tensors(name):
    base = make(name).eval()
    finetuned = tuned(base)
    batch = {"input_ids": torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))}
    delta = prune(base, finetuned, "dare", 0.5)

    def forward(piece):
        output = finetuned(**piece)
        return output.logits if "logits" in output else output.last_hidden_state

    gradients = BatchGradients(finetuned, batch, forward)
    for parameter, original in zip(finetuned.parameters(), base.parameters(), strict=True):
        parameter.data.copy_(original)
    found = gradients.gradients(delta, 0)
    key = max((k for k in found if "experts.0.w1" in k or "Wqkv" in k), key=len)
    steepest, step = int(found[key].abs().argmax()), 0.01  # no token changes its expert
    losses = []
    for sign in (1, -1):
        moved = SparseDelta.from_bytes(*delta.to_bytes())
        moved.tensors[key].values[steepest] += sign * step * delta.q
        losses.append(gradients.loss(moved, 0))
    assert float(found[key][steepest]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05)


class Distiller(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.register_buffer("temperature", torch.tensor(2.0))


def test_beside_a_frozen_teacher_the_student_is_meant():
    base = make("vit")
    finetuned = tuned(base)
    held = Distiller(finetuned, make("vit", seed=1))
    assert set(canonical_tensors(held)) == {*canonical_tensors(base), "temperature"}
    assert prune(base, held, "dare", 0.5).tensors.keys() == prune(base, finetuned, "dare", 0.5).tensors.keys()


def test_beside_its_average_the_model_that_is_trained_is_meant():
    base = make("vit")
    finetuned = nn.Module()
    finetuned.model = tuned(base)
    finetuned.ema = AveragedModel(finetuned.model)
    expected = prune(base, finetuned.model, "dare", 0.5)
    delta = prune(base, finetuned, "dare", 0.5)
    assert delta.to_bytes()[0] == expected.to_bytes()[0]
    assert not delta.carried


def test_of_two_models_that_are_trained_neither_is_guessed():
    base = make("vit")
    held = Distiller(tuned(base), make("vit", seed=1))
    held.requires_grad_(True)
    with pytest.raises(ValueError, match=r"there 2 times, under 'student\..*'teacher\."):
        prune(base, held, "dare", 0.5)
