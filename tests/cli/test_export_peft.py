"""dpp export DELTA --peft: the adapter's folder, what is said of it, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_glue import make_model
from transformers import BertForSequenceClassification, BertModel

from dpp_lightning.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base without a head, a classifier of three labels, and a delta of low rank."""
    place = tmp_path_factory.mktemp("made")
    base = make_model(place / "base", BertModel)
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(place / "tuned")
    pruned = f"prune {base} {place / 'tuned'} --method lowrank --method_settings.rank 4 --output {place / 'delta'}"
    assert main(pruned.split()) == 0
    return place


def run(made, words, capsys):
    """Exit code and the lines that the command said."""
    capsys.readouterr()
    code = main([word.replace("@", f"{made}/") for word in words.split()])
    return code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]


@torch.no_grad()
def test_the_adapter_computes_as_the_dense_model_that_apply_writes(made, tmp_path, capsys):
    code, lines = run(made, f"export @delta --peft --output {tmp_path}/adapter", capsys)
    assert code == 0
    assert "vLLM" in lines[-2]
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = sum(name.endswith(".lora_A.weight") for name in held)
    assert f"LoRA of {layers} modules" in lines[-1]
    assert lines[-1].endswith(f"{sum(tensor.nbytes for tensor in held.values()):,} bytes")
    assert run(made, f"apply @base @delta --output {tmp_path}/dense", capsys)[0] == 0
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    torch.manual_seed(7)
    base = BertForSequenceClassification.from_pretrained(made / "base", num_labels=3).eval()
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens = {"input_ids": torch.arange(4, 24).reshape(2, 10)}
    assert torch.allclose(adapted(**tokens).logits, dense(**tokens).logits, atol=2e-5)


def test_lora_only_in_sixteen_bits_is_smaller(made, tmp_path, capsys):
    assert run(made, f"export @delta --peft --base @base --output {tmp_path}/whole", capsys)[0] == 0
    words = f"export @delta --peft --base @base --lora_only --dtype bfloat16 --output {tmp_path}/maps"
    code, lines = run(made, words, capsys)
    assert code == 0
    assert "left out" in lines[-2]
    whole, maps = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "maps"))
    assert maps.stat().st_size < 0.6 * whole.stat().st_size
    settings = json.loads((tmp_path / "maps" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"{made}/base"


REFUSED = {
    "export @delta --peft --pruning_rate 0.5 --output OUT": "--pruning_rate: not of a LoRA adapter",
    "export @delta --peft --dtype int4 --output OUT": "--dtype int4: LoRA weights are float32, bfloat16 or float16",
    "export @delta --lora_only --output OUT": "--lora_only: only of a LoRA adapter; give --peft too",
    "export @base --peft --output OUT": "is no delta folder but a model",
    "export @delta --peft --base @delta --output OUT": "is a delta, not a model",
    "export @delta --peft --base @base --output @delta": "is the same folder as DELTA",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line(words, made, tmp_path, capsys):
    code, (line,) = run(made, words.replace("OUT", f"{tmp_path}/adapter"), capsys)
    assert code == 2
    assert REFUSED[words] in line
    assert not (tmp_path / "adapter").exists()


def test_an_older_adapter_is_replaced_on_request_alone(made, tmp_path, capsys):
    words = f"export @delta --peft --output {tmp_path}/adapter"
    assert run(made, words, capsys)[0] == 0
    code, lines = run(made, words, capsys)
    assert code == 2
    assert "holds an adapter already: give --overwrite" in lines[-1]
    assert run(made, f"{words} --lora_only --overwrite", capsys)[0] == 0
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_bias"]
