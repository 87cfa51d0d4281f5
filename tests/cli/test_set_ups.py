"""Trainers that cannot work with what the config asks for: one line before any training, with the cure."""

import pytest
from lightning.pytorch import loggers
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli import main

FIT = ["fit", "--config", "quickstart.yaml", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
BEST = [
    "--trainer.callbacks",
    "[{class_path: DeltaPruneCallback, init_args: {method: dare, monitor: val_score, ckpt: best}}]",
]


def refused(capsys, words):
    assert main([*FIT, *words]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "Epoch" not in shown.out
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("dpp fit: error: ")
    return line


def test_barebones_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "leave barebones out (--trainer.barebones false)" in refused(capsys, ["--trainer.barebones", "true"])


def test_barebones_is_refused_in_python(tmp_path):
    callback = DeltaPruneCallback("dare", 0.9, monitor="acc", output_dir=str(tmp_path))
    settings = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    settings |= {"num_sanity_val_steps": None, "default_root_dir": str(tmp_path), "barebones": True}
    with pytest.raises(ValueError, match="barebones=True. logs nothing"):
        trainer(callback, **settings).fit(Foreign(), train_loader(), val_loader())


@pytest.mark.parametrize(
    ("logger", "flag", "package"),
    [("WandbLogger", "wandb._WANDB_AVAILABLE", "wandb"), ("MLFlowLogger", "mlflow._MLFLOW_AVAILABLE", "mlflow"),
     ("CometLogger", "comet._COMET_AVAILABLE", "comet")],
)  # fmt: skip
def test_a_logger_whose_package_is_missing_is_one_line(tmp_path, monkeypatch, capsys, logger, flag, package):
    monkeypatch.chdir(tmp_path)
    module, name = flag.split(".")
    monkeypatch.setattr(getattr(loggers, module), name, Missing(package))
    line = refused(capsys, ["--trainer.logger", logger])
    assert "the logger cannot be used" in line
    assert package in line
    assert "--trainer.logger CSVLogger" in line


class Missing:
    """A requirement that is not met, as lightning_utilities has it."""

    def __init__(self, package):
        self.package = package

    def __bool__(self):
        return False

    def __str__(self):
        return f"Module not found: '{self.package}'. HINT: Try running `pip install -U {self.package}`"


def test_no_checkpoints_for_the_best_one_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, ["--trainer.enable_checkpointing", "false", *BEST])
    assert "ckpt='best'" in line or "ModelCheckpoint" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.enable_progress_bar", "false", "--trainer.callbacks+", "RichProgressBar"], "enable_progress_bar"),
        (["--trainer.limit_val_batches", "0"], "limit_val_batches above 0"),
        (["--trainer.strategy", "deepspeed"], "pip install"),
        (["--trainer.accelerator", "gpu"], "gpu"),
        (
            ["--trainer.enable_checkpointing", "false", "--trainer.callbacks+", "ModelCheckpoint"],
            "enable_checkpointing",
        ),
    ],
)
def test_other_set_ups_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, words)
