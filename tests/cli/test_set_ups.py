"""Trainers that cannot work with what the config asks for: one line before any training, with the cure."""

import sys

import pytest
import torch
from lightning.pytorch import loggers
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.callbacks import ApplyDelta, DeltaPruneCallback
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
    with pytest.raises(ValueError, match=r"barebones=True. logs nothing"):
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


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    from lightning.fabric.loggers import tensorboard

    monkeypatch.chdir(tmp_path)
    for flag in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, flag, Missing("tensorboard"))
    line = refused(capsys, ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "runs"])
    assert "the logger cannot be used" in line
    assert "tensorboard" in line.split("cannot be used", 1)[1]


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


def test_classes_of_the_current_folder_are_found_by_the_console_command(tmp_path, monkeypatch, capsys):
    """The script ``dpp`` does not put the current folder on the path, as ``python -m`` does."""
    (tmp_path / "own_part.py").write_text(
        "import lightning.pytorch as pl\n\nclass Note(pl.Callback):\n"
        "    def on_fit_start(self, trainer, pl_module):\n        print('own callback')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.setattr(sys, "argv", ["dpp", *FIT, "--trainer.callbacks", "own_part.Note"])
    assert main() == 0
    assert "own callback" in capsys.readouterr().out


def test_a_sweep_without_a_test_step_names_the_other_split(tmp_path, monkeypatch, capsys):
    (tmp_path / "no_test.py").write_text(
        "from dpp_lightning.tasks import VisionModule\nimport lightning.pytorch as pl\n\n"
        "class NoTest(VisionModule):\n    test_step = pl.LightningModule.test_step\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(
        {"state_dict": {"weight": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6"}, tmp_path / "weights.ckpt"
    )
    words = ["sweep", "--config", "quickstart.yaml", "--model", "no_test.NoTest", "--ckpt_path", "weights.ckpt"]
    assert main([*words, "--output", "sweep", "--methods", "dare", "--rates", "0.9"]) == 2
    assert "--split validation" in capsys.readouterr().err.splitlines()[-1]


def test_two_deltas_on_one_base_are_refused(tmp_path):
    two = [ApplyDelta("a"), ApplyDelta("b")]
    with pytest.raises(ValueError, match=r"the deltas a and b would both go onto one base.*dpp merge"):
        trainer(*two, default_root_dir=str(tmp_path)).validate(Foreign(), val_loader(), verbose=False)
    assert two[0].state_key != two[1].state_key


def test_auto_without_a_limit_is_refused_before_training():
    with pytest.raises(ValueError, match="auto goes by one limit"):
        DeltaPruneCallback("auto", 0.9, monitor="acc")
    DeltaPruneCallback("auto", 0.9, monitor="acc", method_settings={"auto": {"max_bytes": 10_000}})
