"""dpp inspect BASE FINETUNED on folders: its numbers, its advice, and what it says of wrong arguments."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_glue import bert_config, make_model, make_tokenizer
from transformers import AutoTokenizer, BertForSequenceClassification

from dpp_lightning.cli import main
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

LINEAR = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, two classifiers fine-tuned from it (with a small and a large delta), and calibration files."""
    folder = tmp_path_factory.mktemp("pair")
    make_model(folder / "base")
    for name, scale in (("small", 1e-3), ("large", 0.05)):
        model = BertForSequenceClassification(bert_config(num_labels=3))
        model.bert.load_state_dict({k: v.clone() for k, v in load_file(folder / "base/model.safetensors").items()})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
        make_tokenizer(folder / name)
    lines = [f"w{i} w{2 * i} w3 w9" for i in range(12)]
    (folder / "text.txt").write_text("\n".join(lines))
    batch = AutoTokenizer.from_pretrained(folder / "small")(lines, padding=True, return_tensors="pt")
    save_file(dict(batch), folder / "batch.safetensors")
    save_file({"input_ids": batch["input_ids"] + 1000}, folder / "wrong.safetensors")
    return folder


def run(capsys, models, *arguments):
    """Exit code, standard output and standard error."""
    code = main(["inspect", *(str(models / a) if (models / a).exists() else a for a in arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_without_calibration_only_the_delta_is_known(models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, models, "base", "small")
    assert code == 0
    assert LINEAR in out
    assert "mean c" not in out
    assert "--calibration FILE" in out
    assert "not in the base: classifier.bias, classifier.weight" in out
    assert re.search(r"recommended: darex-q; mean \|delta\| is 0\.0008, below 0\.01", out)
    assert "for few bytes: lowrank; with --settings rank=4" in out


def test_the_table_of_influences(models, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, models, "base", "small", "--calibration", "text.txt", "--pruning_rate", "0.99")
    assert code == 0
    assert "factors at p = 0.99: Hoeffding 70.7, Kearns-Saul 46.2; Berend-Kontorovich 14.1, no guarantee" in out
    assert "the least here is 0.16" in out
    assert "for few bytes: auto; with --max_bytes 50kB" in out
    assert all(name in out for name in ("mean c", "var c", "bound", "outliers", "massive"))
    _, out, _ = run(capsys, models, "base", "small", "--pruning_rate", "0.3")
    assert "Berend" not in out


@pytest.mark.parametrize("data", ["text.txt", "batch.safetensors"])
def test_json_has_the_numbers_of_a_twin(models, capsys, data):
    code, out, _ = run(capsys, models, "base", "small", "--calibration", data, "--json")
    assert code == 0
    report = json.loads(out)
    rows = {row["name"]: row for row in report["layers"]}
    base, tuned = load_file(models / "base/model.safetensors"), load_file(models / "small/model.safetensors")
    deltas = {name: tuned["bert." + name] - tensor for name, tensor in base.items()}
    assert set(rows) == set(deltas)
    flat = torch.cat([delta.flatten() for delta in deltas.values()]).abs()
    assert report["mean_delta"] == pytest.approx(float(flat.mean()), rel=1e-5)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    c = deltas[LINEAR].double() * mean_input(models)
    influence = rows[LINEAR]["influence"]
    assert influence["variance"] == pytest.approx(float(c.var(1, correction=0).mean()), rel=1e-4)
    assert influence["mean"] == pytest.approx(float(c.mean(1).abs().mean()), rel=1e-4)
    ratio = rows[LINEAR]["bounds"]["hoeffding"]["mean"] / report["factors"]["hoeffding"]
    assert ratio == pytest.approx(float(c.norm(dim=1).mean()) * 3.6889**0.5, rel=1e-4)
    assert rows["embeddings.word_embeddings.weight"]["influence"] is None


@torch.no_grad()
def mean_input(models):
    """What the first layer's query sees, over the tokens that are no padding."""
    model = BertForSequenceClassification.from_pretrained(models / "small").eval()
    batch = load_file(models / "batch.safetensors")
    hidden = model.bert.embeddings(batch["input_ids"], token_type_ids=batch["token_type_ids"])
    return hidden[batch["attention_mask"].bool()].double().mean(0)


@pytest.mark.parametrize(
    ("model", "options", "method", "optimizer"),
    [
        ("small", ["--labels"], "darex-q", None),
        ("small", ["--can_retrain"], "darex-q", "AdamR-L2"),
        ("large", [], "magnitude", None),
        ("large", ["--labels"], "dppa", None),
        ("large", ["--calibration", "text.txt", "--calibration_samples", "2"], "wanda", None),
    ],
)
def test_the_advice(models, capsys, model, options, method, optimizer):
    code, out, _ = run(capsys, models, "base", model, "--json", *options)
    assert code == 0
    advice = json.loads(out)["recommendation"]
    assert (advice["method"], advice["optimizer"]) == (method, optimizer)


def test_one_argument_is_still_a_delta(models, capsys, tmp_path):
    prune_checkpoint(models / "base", models / "small", tmp_path / "delta", PruningSpec())
    assert main(["inspect", str(tmp_path / "delta"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "dare"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base"], "is no delta folder but a model"),
        (["base", "--labels"], "--labels: of a pair of models"),
        (["base", "--calibration", "text.txt"], "--calibration: of a pair"),
        (["base", "small", "--revision", "main"], "--base_revision"),
        (["base", "./none"], "no such file or folder"),
        (["base", "small", "--pruning_rate", "1"], r"\[0, 1\)"),
        (["base", "small", "--calibration", "none.txt"], "--calibration none.txt: no such file"),
        (["base", "small", "--calibration", "text.txt", "--calibration_samples", "0"], "at least 1 example"),
        (
            ["base", "small/model.safetensors", "--calibration", "text.txt"],
            "is a file: expected a folder .* or a hub id",
        ),
        (["base", "small", "--calibration", "base/model.safetensors"], "does not take; it takes input_ids"),
        (["base", "small", "--calibration", "wrong.safetensors"], "has indices beyond a table"),
        (["base", "small", "large"], "large is not expected"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(models, capsys, arguments, message):
    code, out, err = run(capsys, models, *arguments)
    assert code == 2
    assert out == ""
    assert re.search(message, err)
    assert "Traceback" not in err


def test_layers_of_one_side_only_are_refused(models, capsys, tmp_path):
    tensors = load_file(models / "small/model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "bert." + LINEAR}, tmp_path / "model.safetensors")
    code, _, err = run(capsys, models, "base", str(tmp_path / "model.safetensors"))
    assert code == 2
    assert f"{LINEAR}: only in the base" in err
