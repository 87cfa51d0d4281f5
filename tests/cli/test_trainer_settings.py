"""Settings of the trainer that cannot work are named, with their option, before a model is built."""

import pytest
from jsonargparse import Namespace
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.cli import main
from dpp_lightning.cli.config_checks import class_config
from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.cli.trainer_settings import check_trainer_settings


def check(command="fit", seed=0, **trainer):
    check_trainer_settings(command, Namespace(seed_everything=seed, trainer=Namespace(**trainer)))


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ("fit", {"seed": -3}, "--seed_everything is -3, expected a whole number from 0 to 4294967295"),
        ("fit", {"seed": 2**32}, "--seed_everything is 4294967296"),
        ("fit", {"accumulate_grad_batches": 0}, "--trainer.accumulate_grad_batches is 0, expected .* at least 1"),
        ("fit", {"check_val_every_n_epoch": 0}, "--trainer.check_val_every_n_epoch is 0"),
        ("validate", {"limit_val_batches": 0}, "--trainer.limit_val_batches is 0, so no batch"),
        ("test", {"limit_test_batches": 0.0}, "--trainer.limit_test_batches is 0, so no batch"),
        ("predict", {"limit_predict_batches": 0}, "--trainer.limit_predict_batches is 0, so no batch"),
        ("test", {"barebones": True}, "cannot be used with test"),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_named(command, settings, said):
    with pytest.raises(UsageError, match=said):
        check(command, **settings)


def test_barebones_names_all_that_it_leaves_out_at_once():
    callbacks = [class_config(cls) for cls in (DeltaPruneCallback, EarlyStopping, ModelCheckpoint)]
    with pytest.raises(
        UsageError,
        match="with trainer.logger, trainer.enable_checkpointing, DeltaPruneCallback, EarlyStopping, ModelCheckpoint: "
        r"leave barebones out \(--trainer.barebones false\), or these",
    ):
        check(barebones=True, logger=True, enable_checkpointing=True, num_sanity_val_steps=0, callbacks=callbacks)


def test_what_works_is_let_through():
    check(seed=True)
    check(seed=None, accumulate_grad_batches=1, check_val_every_n_epoch=None, limit_val_batches=0)
    check(barebones=True, logger=False, enable_checkpointing=False, enable_progress_bar=None, callbacks=None)
    check("test", limit_test_batches=0.5)


def test_a_folder_for_checkpoints_that_cannot_be_made_is_refused_before_the_first_epoch(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot write into .*file.*: Not a directory"):
        check(callbacks=class_config(ModelCheckpoint, dirpath=str(tmp_path / "file" / "checkpoints")))
    check(callbacks=[class_config(ModelCheckpoint, dirpath=str(tmp_path / "new"))])
    check(callbacks=[class_config(ModelCheckpoint, dirpath="s3://bucket/run")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.accumulate_grad_batches", "0"], "--trainer.accumulate_grad_batches is 0"),
        (["--trainer.devices", "abc"], "`devices`"),
        (["--trainer.accelerator", "tpu"], "torch_xla"),
        (["--trainer.plugins", "BitsandbytesPrecision", "--trainer.plugins.mode", "nf4"], "pip install -U 'bitsandbytes'"),
        (["--trainer.precision", "transformer-engine"], "transformer_engine"),
    ],
)  # fmt: skip
def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "quickstart.yaml", *words]) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("dpp fit: error: ")
    assert said in line


@pytest.mark.parametrize("words", [[], ["--trainer.limit_test_batches", "1"]])
def test_a_test_without_a_checkpoint_says_what_is_scored(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(["test", "--config", "quickstart.yaml", "--trainer.callbacks", "null", *words]) == 0
    assert "dpp test: no checkpoint was given, so the scores are those of the base" in capsys.readouterr().err
