"""Adapters in a checkpoint are merged with the ranks and scales that peft gives them, or refused with the cure."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_causal import make_decoder, save_decoder

from dpp_lightning.cli import main
from dpp_lightning.export.lora_settings import LoRASettings

TARGETS = ["q_proj", "v_proj", "down_proj"]
FIRST = r"^model\.layers\.0\.self_attn\.q_proj"
SETTINGS = {
    "rslora": {"use_rslora": True},
    "plain, said": {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": None, "use_dora": False},
    "alphas": {"alpha_pattern": {"down_proj": 3, "layers.0.self_attn.v_proj": 20}},
    "ranks": {"rank_pattern": {"v_proj": 2, FIRST: 5}},
    "first of two that fit": {"alpha_pattern": {"layers.1.*": 2, "q_proj": 16}},
    "all": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {FIRST: 1, "v_proj": 32}},
}


def adapted(settings, make=get_peft_model):
    """A decoder with adapters whose B is not zero."""
    settings = {name: value for name, value in settings.items() if value is not None}
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, **settings)
    return make(config, make_decoder()) if make is inject_adapter_in_model else make(make_decoder(), config)


def export(model, settings, folder):
    """Exit code of the export of a checkpoint with these hyper-parameters."""
    checkpoint = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {
            "pretrained": str(save_decoder(folder / "base")),
            "lora": {"r": 4, "alpha": 8, **settings},
        },
    }
    torch.save(checkpoint, folder / "x.ckpt")
    return main(["export", str(folder / "x.ckpt"), "--output", str(folder / "out")])


def refusal(model, settings, folder, capsys):
    """The one line of a refusal, which leaves nothing behind."""
    assert export(model, settings, folder) == 2
    assert not (folder / "out").exists()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "merge_and_unload" in line)
    return line


@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_as_peft_merges(kind, tmp_path):
    model = adapted(SETTINGS[kind])
    assert export(model, SETTINGS[kind], tmp_path) == 0
    written, merged = load_file(tmp_path / "out" / "model.safetensors"), model.merge_and_unload().state_dict()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)
    plain = make_decoder().state_dict()
    changed = [name for name in written if not torch.equal(merged[name], plain[name])]
    assert len(changed) >= 6


def test_names_of_adapters_in_a_model_that_is_no_peft_model(tmp_path, capsys):
    settings = {"alpha_pattern": {"layers.0.self_attn.q_proj": 16}}
    model = adapted(settings, inject_adapter_in_model)
    assert export(model, settings, tmp_path) == 0
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(weight, expected.detach(), atol=1e-6, rtol=1e-5)
    (tmp_path / "other").mkdir()  # where the model's names begin is not known
    said = refusal(adapted({}, inject_adapter_in_model), {"alpha_pattern": {FIRST: 16}}, tmp_path / "other", capsys)
    assert "is the name of no adapted module, such as model.model.layers.0." in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "lora.use_dora = True"),
        ({"alora_invocation_tokens": [3]}, "lora.alora_invocation_tokens = [3]"),
        ({"lora_alpha": 16}, "lora.lora_alpha = 16"),
        ({"scale": 2}, "lora.scale = 2"),
        ({"alpha_pattern": {"k_proj": 3}}, "'k_proj', which is the name of no adapted module"),
        ({"alpha_pattern": {"q_proj": "3"}}, "lora.alpha_pattern is {'q_proj': '3'}, expected names of modules and"),
        ({"rank_pattern": ["q_proj"]}, "lora.rank_pattern is ['q_proj'], expected names"),
        ({"rank_pattern": {"q_proj(": 3}}, "expected names"),
        ({"rank_pattern": {"q_proj": 3}}, "adapters of rank 4, but the hyper-parameters say r = 3"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(settings, said, tmp_path, capsys):
    assert said in refusal(adapted({}), settings, tmp_path, capsys)


def test_settings_of_a_configuration_of_peft_are_known():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.1)
    settings = LoRASettings.read({"lora": {**config.to_dict(), "alpha": 8}}, "q_proj.weight")
    assert (settings.rank("a.q_proj"), settings.scaling("a.q_proj")) == (4, 2.0)
