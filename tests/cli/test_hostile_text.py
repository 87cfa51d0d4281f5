"""One hostile name, of folders, files, tensors, tasks, settings and rows, sent through every command: what comes out."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hostile import repaired
from safetensors.torch import load_file, save_file
from tiny_glue import make_data, make_model
from transformers import BertForSequenceClassification, BertModel

from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import MODEL_FILE
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

# A title for the terminal, colours, an overwritten line, a turned line, no width, rich's markup, Markdown, HTML, TeX.
NAME = "[red]:boom:\x1b]0;x\x07\x1b[31m\x1b[2K\r\u202e\u200b\u2028\x9b|`**a**<b>$x_{$"
TYPED = "[red]:boom:\u202e\u200b\u2028|`**a**<b>$x_{$"  # a command line with control characters is refused
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f]")
RUN = """
import json, sys, traceback
from dpp_lightning.cli.commands import main
for words in json.load(open("commands.json")):
    sys.argv = ["dpp", *words]
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = "raised"
    for stream in (sys.stdout, sys.stderr):
        print("=== ended", code, file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, deltas, data and a checkpoint under hostile names in one folder."""
    place = tmp_path_factory.mktemp("hostile") / NAME
    base = make_model(place / "base", BertModel)
    for k, name in enumerate(("tuned", "other")):
        model = BertForSequenceClassification.from_pretrained(base, num_labels=2 + k)
        model.save_pretrained(place / name)
        prune_checkpoint(base, place / name, place / f"{TYPED}{k}", PruningSpec("dare", 0.5))
    tensors = load_file(place / "tuned/model.safetensors")
    renamed = {f"{name}{NAME}" if "layer.1" in name else name: tensor for name, tensor in tensors.items()}
    _folder(place / "renamed", place / "tuned", renamed)
    _folder(place / "renamed base", place / "base", {f"{name}{NAME}": t for name, t in tensors.items()})
    _folder(place / "beside", place / "tuned", tensors).joinpath(f"tokenizer-{NAME}.json").write_text("{}")
    index = {"weight_map": {f"a{NAME}": f"{NAME}.safetensors"}}
    _folder(place / "sharded", place / "tuned", {}).joinpath("model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    save_file(tensors, place / "sharded" / f"{NAME}.safetensors")
    _folder(place / "configured", place / "tuned", tensors).joinpath("config.json").write_text(
        json.dumps({"model_type": NAME})
    )
    torch.save(
        {"state_dict": {f"model.{n}": t for n, t in renamed.items()}, "hyper_parameters": {"pretrained": NAME}},
        place / "a.ckpt",
    )
    for key, value in (("method", f"a{NAME}"), ("base_name", NAME), ("settings", {"tasks": [NAME, "b"]})):
        _with_config(place / f"{TYPED}0", place / f"delta {key}", key, value)
    make_data(place.parent / "data", "sst2", 40, 20)
    _sweep_config(place)
    return place


def _folder(folder, like, tensors):
    shutil.copytree(like, folder)
    (folder / "model.safetensors").unlink()
    if tensors:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _with_config(delta, folder, key, value):
    shutil.copytree(delta, folder)
    _, config = repaired(
        (folder / MODEL_FILE).read_bytes(), json.loads((folder / CONFIG_FILE).read_bytes()) | {key: value}
    )
    (folder / CONFIG_FILE).write_bytes(config)


def _sweep_config(place):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    model = {"class_path": "GLUEModule", "init_args": {"task": "sst2", "pretrained": str(place / "base")}}
    data = {"class_path": "GLUEDataModule", "init_args": {"path": str(place.parent / "data")}}
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": ".", "filename": "fitted"},
    }
    trainer = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [saving], **quiet}
    config = {"trainer": trainer, "model": model, "data": data}
    (place / "a.yaml").write_text(json.dumps(config))
    (place / "swept").mkdir()
    row = {"method": NAME, "score": 1.0, "run": {NAME: NAME}}
    (place / "swept/results.jsonl").write_text(
        json.dumps({"method": "base", "score": 0.5, "run": {NAME: NAME}}) + "\n" + json.dumps(row) + "\n"
    )


FIT = ["--config", "a.yaml"]
COMMANDS = [
    *([command, *FIT, f"--{TYPED}", TYPED] for command in ("fit", "validate", "test", "predict", "sweep")),
    *([command, "--config", f"no{TYPED}.yaml"] for command in ("fit", "sweep", "prune")),
    ["fit", *FIT, "--ckpt_path", TYPED],
    ["fit", *FIT, "--trainer.callbacks", TYPED],
    ["fit", *FIT, "--model.pretrained", TYPED],
    ["test", *FIT, "--ckpt_path", "a.ckpt"],
    ["test", *FIT, "--delta", "delta settings"],
    ["fit", *FIT],
    ["sweep", *FIT, "--ckpt_path", "fitted.ckpt", "--output", "swept", "--methods", TYPED],
    *(["sweep", *FIT, "--ckpt_path", "fitted.ckpt", "--output", folder, "--methods", "dare", "--rates", "0.5"]
      for folder in ("swept", f"sweep{TYPED}")),
    ["prune", "base", "tuned", "--pruning_rate", "0.5", "--output", f"new{TYPED}"],
    ["prune", "base", "tuned", "--pruning_rate", "0.5", "--output", f"more{TYPED}", "--method", TYPED],
    *(["prune", "base", name, "--pruning_rate", "0.5", "--output", f"out {name}"]
      for name in ("renamed", "sharded", "configured", "beside", TYPED)),
    ["prune", "base", "tuned", "--pruning_rate", "0.5", "--output", "x", "--carry", f"*{TYPED}*"],
    ["prune", "renamed base", "renamed", "--pruning_rate", "0.5", "--output", "y"],
    *(["apply", "base", name, "--output", f"dense {name}"] for name in (f"{TYPED}0", "delta method", "delta base_name", TYPED)),
    ["merge", "base", f"{TYPED}0", f"{TYPED}1", "--output", f"merged{TYPED}"],
    ["merge", "base", f"{TYPED}0", f"{TYPED}1", "--tasks", "a", "b", "--output", f"merged{TYPED}"],
    ["merge", "base", f"{TYPED}0", f"{TYPED}1", "--tasks", TYPED, "b", "--output", "z"],
    ["export", "a.ckpt", "--output", f"export{TYPED}"],
    ["export", "a.ckpt", "--config_from", "tuned", "--output", f"export{TYPED}"],
    ["inspect", f"{TYPED}0"],
    ["inspect", f"{TYPED}0", "--json"],
    ["inspect", f"merged{TYPED}"],
    ["inspect", "delta settings"],
    ["inspect", "base", "tuned"],
    ["inspect", "renamed base", "renamed"],
    ["eval", "base", "--tasks", TYPED, "--output", f"{TYPED}.json"],
    *(["serve", "base", word] for word in (TYPED, f"{TYPED}={TYPED}", f"a={TYPED}")),
    ["serve", "renamed base", f"{TYPED}={TYPED}0"],
    ["push", f"{TYPED}0", TYPED],
    ["push", TYPED, "a/b"],
    ["plan", "base"],
    ["plan", f"{TYPED}0"],
    ["plan", "renamed"],
    ["configs", TYPED],
    ["completion", TYPED],
    [TYPED],
    [f"--{TYPED}"],
    ["inspect", NAME],
]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(place):
    """Of every command its words, its exit code and what it wrote to both streams."""
    (place / "commands.json").write_text(json.dumps(COMMANDS))
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(place.parent / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run([sys.executable, "-c", RUN], cwd=place, capture_output=True, env=environment)
    written = [re.split(r"=== ended (.*)\n", stream.decode()) for stream in (done.stdout, done.stderr)]
    out, err = ([*zip(parts[::2], parts[1::2], strict=False)] for parts in written)
    assert len(out) == len(err) == len(COMMANDS)
    return [(words, code, text, more) for words, (text, code), (more, _) in zip(COMMANDS, out, err, strict=True)]


def test_no_command_sends_a_terminal_what_it_would_act_on(outputs):
    for words, _, *texts in outputs:
        for text in texts:
            assert not HIDDEN.search(text), (words, text)


def test_every_refusal_is_one_line_and_an_exit_code(outputs):
    for words, code, _, error in outputs:
        assert code in ("0", "1", "2"), (words, error)
        assert "Traceback" not in error, (words, error)
    refused = [words[0] for words, code, *_ in outputs if code == "2"]
    every = {"fit", "sweep", "prune", "apply", "merge", "export", "inspect", "eval", "serve", "push", "plan"}
    assert set(refused) >= every


def test_what_is_written_for_people_has_no_markup_of_others(outputs, place):
    written = [*place.rglob("README.md"), *place.rglob("table.md")]
    assert len(written) >= 4
    for file in written:
        text = file.read_text()
        assert not HIDDEN.search(text)
        assert "<b>" not in re.sub(r"(`+).*?\1", "", text), file
    merged = (place / f"merged{TYPED}" / "README.md").read_text()
    assert '.for_task("a")' in merged
