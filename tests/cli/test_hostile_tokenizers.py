"""Files of tokenizers that hold anything: every command that reads one says so in one line."""

import json
import shutil

import pytest
import torch
from tiny_glue import make_data, make_model
from transformers import BertForSequenceClassification

from dpp_lightning.cli import main
from dpp_lightning.cli.eval import load_tokenizer as tokenizer_of_eval
from dpp_lightning.tasks.common.pretrained import load_tokenizer

DEEP = "[" * 100_000 + "]" * 100_000
NO_OBJECT = ["", "{", "[]", "3", "null", DEEP, "\0\xff"]
HOSTILE = [
    *[("tokenizer.json", text) for text in [*NO_OBJECT, "{}", '{"model": 3}', '{"added_tokens": [{"id": -1}]}']],
    *[("tokenizer_config.json", text) for text in NO_OBJECT],
    *[("special_tokens_map.json", text) for text in NO_OBJECT],
    ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ("tokenizer_config.json", '{"model_max_length": "x"}'),
    ("tokenizer_config.json", '{"pad_token": {"a": []}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}'),
    ("tokenizer_config.json", '{"extra_special_tokens": 3}'),
    ("special_tokens_map.json", '{"pad_token": {"content": 3}}'),
]


def short(value):
    return value if len(value) < 40 else "deep"


hostile = pytest.mark.parametrize(("name", "text"), HOSTILE, ids=short)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a model tuned from it, texts, and data."""
    place = tmp_path_factory.mktemp("place")
    base = make_model(place / "base")
    make_data(place / "data", "sst2", 20, 10)
    model = BertForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    shutil.copytree(base, place / "tuned")
    model.save_pretrained(place / "tuned")
    (place / "texts.txt").write_text("good film\nbad film\n" * 8)
    return place


@pytest.fixture
def changed(place, tmp_path):
    """Gives a copy of the tuned model with one file that holds a text."""

    def change(name, text):
        folder = shutil.copytree(place / "tuned", tmp_path / "changed")
        (folder / name).write_text(text, encoding="latin-1")
        return str(folder)

    return change


def one_line(capsys, command):
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dpp {command}: error: ")
    return line


@hostile
def test_prune_with_texts(name, text, place, changed, tmp_path, capsys):
    words = ["prune", str(place / "base"), changed(name, text), "--method", "darex-q"]
    capsys.readouterr()
    assert main([*words, "--calibration", str(place / "texts.txt"), "--output", str(tmp_path / "delta")]) == 2
    assert "tokenizer" in one_line(capsys, "prune")


@hostile
def test_what_tasks_and_eval_load(name, text, changed):
    folder = changed(name, text)
    with pytest.raises(ValueError, match=r"model\.pretrained.*tokenizer"):
        load_tokenizer(folder, None, "model.pretrained")
    with pytest.raises(ValueError, match=r"MODEL .*: its tokenizer cannot be loaded"):
        tokenizer_of_eval(folder, folder, False)


def test_a_test_of_a_task(place, changed, capsys):
    config = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "model": {
            "class_path": "GLUEModule",
            "init_args": {"task": "sst2", "pretrained": changed("tokenizer.json", "3")},
        },
        "data": {"class_path": "GLUEDataModule", "init_args": {"path": str(place / "data")}},
    }
    (place / "config.yaml").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["validate", "--config", str(place / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert "dpp validate: error: model.pretrained" in said
    assert "Traceback" not in said
