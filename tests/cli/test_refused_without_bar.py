"""A command that refuses what it was given says that in one line, without a bar of which nothing was done."""

import torch
from safetensors.torch import save_file

from dpp_lightning.cli import main


def test_prune_shows_no_bar_before_its_inputs_fit(tmp_path, capsys):
    for name, columns in (("base", 4), ("finetuned", 5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(8, columns)}, tmp_path / name / "model.safetensors")
    words = ["prune", str(tmp_path / "base"), str(tmp_path / "finetuned"), "--method", "dare"]
    assert main([*words, "--output", str(tmp_path / "delta")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpp prune: error: ")


def test_a_prune_that_works_shows_its_bar(tmp_path, capsys):
    for name, value in (("base", 1.0), ("finetuned", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((8, 4), value)}, tmp_path / name / "model.safetensors")
    words = ["prune", str(tmp_path / "base"), str(tmp_path / "finetuned"), "--method", "dare"]
    assert main([*words, "--output", str(tmp_path / "delta")]) == 0
    assert "bytes" in capsys.readouterr().err
