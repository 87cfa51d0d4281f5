"""Checkpoints of a run appear whole or not at all, and all ranks go on from the same one."""

from pathlib import Path

import pytest
import torch
from full_disk import files_up_to
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_glue import make_trainer

from dpp_lightning.cli.exit_codes import FAILED, describe
from dpp_lightning.trainer.checkpoint_io import AtomicCheckpointIO, SameCheckpoint


def test_a_save_that_is_broken_off_leaves_the_former_checkpoint_and_nothing_that_looks_like_one(tmp_path, monkeypatch):
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]

    def tear(checkpoint, file):
        file.write(b"half")
        assert Path(file.name).parent == tmp_path, "on the file system of the final name"
        assert Path(file.name).suffix != ".ckpt"
        raise OSError("no space left")

    monkeypatch.setattr("dpp_lightning.trainer.checkpoint_io.torch.save", tear)
    with pytest.raises(OSError, match="no space"):
        saver.save_checkpoint({"step": 2}, path)
    assert saver.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_disk_that_is_full_is_an_error_of_the_system(size, tmp_path):
    """Not what torch says of it: ``unexpected pos 64``."""
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, path)
    with files_up_to(size), pytest.raises(OSError, match="File too large") as error:
        saver.save_checkpoint({"weight": torch.ones(5000)}, path)
    assert describe(error.value)[1] == FAILED
    assert saver.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_what_lightning_itself_would_write(tmp_path):
    state = {"state_dict": {"weight": torch.arange(3.0)}, "epoch": 1}
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "deep/er/a.ckpt")
    loaded = torch.load(tmp_path / "deep/er/a.ckpt", weights_only=True)
    assert loaded["epoch"] == 1
    assert torch.equal(loaded["state_dict"]["weight"], state["state_dict"]["weight"])


class Ranks:
    """A strategy whose ranks answer a question as listed."""

    def __init__(self, *others):
        self.others = others

    def reduce_boolean_decision(self, decision, all=True):
        answers = (decision, *self.others)
        return min(answers) if all else max(answers)


@pytest.mark.parametrize("others", [(True,), (False,), (True, False)])
def test_ranks_that_see_different_checkpoints_are_refused(others, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._accelerator_connector.strategy = trainer_strategy = Ranks(*others)
    trainer_strategy.global_rank = 0
    (tmp_path / "a.ckpt").touch()
    for path, exists in ((tmp_path / "a.ckpt", True), (tmp_path / "b.ckpt", False)):
        check = SameCheckpoint(str(path))
        if set(others) == {exists}:
            check.setup(trainer, None, "fit")
        else:
            with pytest.raises(ValueError, match=f"rank 0 finds {'the' if exists else 'no'} checkpoint"):
                check.setup(trainer, None, "fit")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_last_must_exist_where_weights_are_used(stage, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "run")])
    SameCheckpoint("last").setup(trainer, None, "fit")
    with pytest.raises(ValueError, match="an untrained model"):
        SameCheckpoint("last").setup(trainer, None, stage)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.ckpt").touch()
    SameCheckpoint("last").setup(trainer, None, stage)
