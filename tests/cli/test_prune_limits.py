"""Bytes and settings as they are typed behind ``dpp prune``."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli import main
from dpp_lightning.cli.prune import _named
from dpp_lightning.storage.byte_count import number_of_bytes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("50000", 50_000),
        ("50kB", 50_000),
        ("0.24MB", 240_000),
        ("48KiB", 49_152),
        ("1 M", 1_000_000),
        ("2GB", 2 * 10**9),
    ],
)
def test_bytes_with_their_unit(text, number):
    assert number_of_bytes(text, "--max_bytes") == number


@pytest.mark.parametrize("text", ["", "kB", "-5", "50 apples", "1e3"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="number of bytes such as"):
        number_of_bytes(text, "--max_bytes")


def test_settings_are_numbers_where_they_read_as_numbers():
    assert _named(["rank=4", "rest=0.995", "spread=even"]) == {"rank": 4, "rest": 0.995, "spread": "even"}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        _named(["rank"])


@pytest.fixture
def models(tmp_path):
    """Two folders of weights alone."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.full((8, 8), value)}, tmp_path / name / "model.safetensors")
    return [str(tmp_path / "base"), str(tmp_path / "tuned"), "--output", str(tmp_path / "delta")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--method", "magnitude", "--settings", "budget=tensor", "--method_settings.budget", "model"],
            "the setting budget is given twice, as 'model' and as 'tensor': keep one",
        ),
        (["--max_bytes", "5kB"], "unknown method setting 'max_bytes'; it is one of auto; this method has none"),
        (["--method", "auto", "--settings", "max_bytes=5kB"], "auto trains on calibration data"),
        (
            ["--method", "auto", "--settings", "max_bytes=5kB", "--max_bytes", "6kB"],
            "the setting max_bytes is given twice",
        ),
        (["--method", "auto", "--settings", "max_bytes=much"], "number of bytes such as"),
    ],
)
def test_settings_from_two_places_and_bytes_as_text(models, words, said, capsys):
    assert main(["prune", *models, *words]) == 2
    assert said in capsys.readouterr().err


def test_what_a_file_says_gives_way_to_no_other_setting_silently(models, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("method: magnitude\nsettings: [budget=tensor]\n")
    assert main(["prune", *models, "--config", str(tmp_path / "s.yaml"), "--method_settings.budget", "model"]) == 2
    assert "the setting budget is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["20kB", 20_000])
def test_callbacks_take_bytes_as_text(limit):
    callback = DeltaPruneCallback("auto", method_settings={"auto": {"max_bytes": limit}})
    assert callback.settings.method_settings == {"auto": {"max_bytes": 20_000}}


def test_weights_of_a_merge_in_a_file_that_is_not_there(models, tmp_path, capsys):
    deltas = [str(tmp_path / name) for name in ("d1", "d2")]
    for delta in deltas:
        assert main(["prune", *models[:2], "--output", delta]) == 0
    assert main(["merge", models[0], *deltas, "--output", str(tmp_path / "m"), "--weights", "nosuch.json"]) == 2
    assert "nosuch.json: no such JSON file" in capsys.readouterr().err


def test_a_folder_in_the_home_directory_is_there_in_python_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    callback = DeltaPruneCallback("dare", 0.5, monitor="acc", output_dir="~/deltas")
    trainer(callback).fit(Foreign(), train_loader(), val_loader())
    assert (tmp_path / "deltas" / "results.jsonl").is_file()
    assert (tmp_path / "deltas" / "dare-p0.5-seed0" / "delta_model.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_a_dense_model_whose_head_its_configuration_does_not_fit_is_told(models, tmp_path):
    for name, rows in (("base", 3), ("tuned", 5)):
        weights = {"a.weight": torch.full((8, 8), float(rows)), "classifier.weight": torch.zeros(rows, 8)}
        save_file(weights, tmp_path / name / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert"}')
    assert main(["prune", *models]) == 0
    with pytest.warns(UserWarning, match=r"does not fit classifier.weight \(5 rows, there 3\)"):
        assert main(["apply", models[0], models[-1], "--output", str(tmp_path / "dense")]) == 0
