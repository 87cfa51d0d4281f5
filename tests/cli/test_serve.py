"""dpp serve: what is wrong is one line and exit code 2, before a model is loaded or a process started."""

import shutil
import socket
import sys

import pytest
import torch
from served_deltas import add_delta, fine_tune, make_deltas
from tiny_glue import bert_config, make_model
from transformers import BertForSequenceClassification

from dpp_lightning.cli import main, serve
from dpp_lightning.merging.merge_deltas import merge_checkpoints

DELTA = "delta/sst2"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_deltas(tmp_path_factory.mktemp("served"), {"sst2": ["bad", "good"], "mnli": ["yes", "maybe", "no"]})
    make_model(place / "other", BertForSequenceClassification, seed=5)
    shutil.copytree(place / DELTA, place / "damaged")
    content = bytearray((place / "damaged/delta_model.safetensors").read_bytes())
    content[-100] ^= 1
    (place / "damaged/delta_model.safetensors").write_bytes(content)
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    """Runs in the folder; nothing may be served."""
    monkeypatch.chdir(place)
    pytest.importorskip("litserve")
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr("dpp_lightning.serving.http_server.run_server", lambda *words: pytest.fail("it was served"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "BASE is missing: dpp serve needs it; DELTAS is missing"),
        (["base"], "DELTAS is missing: dpp serve needs it"),
        (["./absent", f"a={DELTA}"], "BASE ./absent: no such file or folder"),
        (["delta/mnli", f"a={DELTA}"], "BASE delta/mnli is a delta, not a model; expected dpp serve BASE NAME=DELTA"),
        (["base", "a=./absent"], "a: ./absent: no such folder"),
        (["base", "a=tuned/sst2"], "a: tuned/sst2 is no delta folder but a model; expected dpp serve BASE NAME=DELTA"),
        (["base", "a=damaged"], "a: delta_model.safetensors does not have the checksum"),
        (["base", DELTA], f"DELTAS {DELTA}: expected NAME=DELTA, such as sst2=deltas/sst2"),
        (["base", "a="], "DELTAS a=: expected NAME=DELTA"),
        (["base", f"a@b={DELTA}"], "the name without @ and /"),
        (["base", f"a={DELTA}", "a=delta/mnli"], f"DELTAS a=delta/mnli: there is a delta of that name, {DELTA}"),
        (["other", f"a={DELTA}"], "a: other is not the base of this delta"),
        (["base", f"a={DELTA}", "--port", "80"], "--port is 80, expected 1024 to 65535"),
        (["base", f"a={DELTA}", "--memory", "much"], "--memory is a number of bytes such as"),
        (["base", f"a={DELTA}", "--max_batch_size", "0"], "--max_batch_size is 0, expected 1 or more"),
        (["base", f"a={DELTA}", "--batch_timeout", "-1"], "--batch_timeout is -1, expected seconds from 0"),
        (["base", f"a={DELTA}", "--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["base", f"a={DELTA}", "--host", "example.org"], "--host"),
        (["base", f"a={DELTA}", "--task", "translation"], "--task"),
    ],
)
def test_what_is_wrong_is_one_line(words, says, capsys):
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "base", f"a={DELTA}", "--port", str(port)]) == 2
    assert (
        f"--port {port} of 127.0.0.1 cannot be used (Address already in use): choose another" in capsys.readouterr().err
    )


@pytest.mark.parametrize("package", ["litserve", "prometheus_client"])
def test_a_missing_package_is_named_with_its_cure(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "base", f"a={DELTA}"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'dpp_lightning[serve]'" in error
    assert error.count("\n") == 1


def test_another_base_is_served_only_with_force(capsys):
    fine_tune("base", "near", ["old", "new"], 9)  # of the base's shape
    with pytest.raises(ValueError, match="a: near is not the base of this delta"):
        serve._read_deltas("near", {"a": DELTA}, force=False)
    assert list(serve._read_deltas("near", {"a": DELTA}, force=True)) == ["a"]


def test_tensors_that_only_the_base_has_must_be_there_too(place):
    """Of a delta that changes the head alone all others are the base's."""
    model = BertForSequenceClassification.from_pretrained("base")
    with torch.no_grad():
        model.classifier.weight += 1
    model.save_pretrained("tuned/head")
    add_delta(place, "head")
    shallower = make_model(place / "shallower", BertForSequenceClassification, bert_config(num_hidden_layers=1))
    assert [*serve._read_deltas("base", {"a": "delta/head"}, force=False)] == ["a"]
    with pytest.raises(ValueError, match=r"a: the delta does not fit .*encoder\.layer\.1.*: not there"):
        serve._read_deltas(shallower, {"a": "delta/head"}, force=True)


def test_a_merged_delta_is_named_by_its_tasks():
    merge_checkpoints("base", [DELTA, "delta/mnli"], "merged", tasks=["sst2", "mnli"])
    carried = serve._read_deltas("base", {"all": "merged", "a": DELTA}, force=False)
    assert [*carried] == ["all@sst2", "all@mnli", "a"]
    assert all(names == {"classifier.weight", "classifier.bias"} for names in carried.values())


def test_the_help_says_where_it_can_be_reached_and_that_nobody_is_asked_for_a_name(capsys):
    assert main(["serve", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: dpp serve BASE DELTAS [DELTAS ...] [options]" in shown
    assert "There is no authentication" in shown
    assert "127.0.0.1 for this machine alone" in shown
