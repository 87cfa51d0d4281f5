"""dpp push: a delta folder is checked, then uploaded by the hub's client; what the hub says comes in a line."""

import os

import pytest
import torch
from recorded_hub import record_hub

from dpp_lightning import prune
from dpp_lightning.cli import main


@pytest.fixture
def folder(tmp_path):
    base = {"w": torch.zeros(4, 5)}
    return prune(base, {"w": torch.ones(4, 5)}).save_pretrained(tmp_path / "delta")


@pytest.fixture
def calls(monkeypatch):
    """What the hub's client is asked."""
    return record_hub(monkeypatch)


FILES = ["README.md", "delta_config.json", "delta_model.safetensors"]


def test_a_folder_is_uploaded(folder, calls, capsys):
    assert main(["push", str(folder), "me/delta"]) == 0
    assert calls == [
        ("token", None), ("repo", "me/delta", None, True), ("upload", "me/delta", FILES, None, "Upload pruned delta"),
    ]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("bytes: README.md, delta_config.json, delta_model.safetensors")
    assert said[1] == "the commit"


def test_options_of_the_upload(folder, calls):
    assert main(["push", str(folder), "me/delta", "--private", "--revision", "v2", "--commit_message", "mine"]) == 0
    assert calls == [
        ("token", None), ("repo", "me/delta", True, True), ("branch", "v2", True),
        ("upload", "me/delta", FILES, "v2", "mine"),
    ]  # fmt: skip


def test_a_token_is_no_option(folder, calls, capsys):
    assert main(["push", str(folder), "me/delta", "--token", "secret"]) == 2
    assert "--token is not an option" in capsys.readouterr().err
    assert not calls


def test_what_is_no_delta_is_not_sent(folder, calls, tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/delta"]) == 2
    assert "is no delta folder" in capsys.readouterr().err
    assert main(["push", "me/other", "me/delta"]) == 2
    assert "me/other: no such folder" in capsys.readouterr().err
    with (folder / "delta_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert main(["push", str(folder), "me/delta"]) == 2
    assert "does not have the checksum" in capsys.readouterr().err
    assert not calls


def test_a_malformed_id_is_refused_before_anything_is_said_to_be_sent(folder, calls, capsys):
    assert main(["push", str(folder), "me/my delta"]) == 2
    told = capsys.readouterr().err
    assert "me/my delta" in told
    assert "uploading" not in told
    assert not calls


class Refused(Exception):
    """As the hub's client raises what its HTTP library does: no OSError."""

    response = type("Response", (), {"status_code": 401})


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Refused("401 Client Error\n\nInvalid username or password."), 2, "hf auth login, or set HF_TOKEN"),
        (ConnectionError("[Errno 111] Connection refused"), 1, "the hub: [Errno 111] Connection refused"),
    ],
)
def test_what_the_hub_answers_comes_in_a_line(folder, monkeypatch, capsys, error, code, said):
    def refuse(token=None):
        raise error

    monkeypatch.setattr("dpp_lightning.storage.hub.HfApi", refuse)
    assert main(["push", str(folder), "me/delta"]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dpp push: failed" if code == 1 else "dpp push: error")
    assert said in last
