"""What a stopped run says: of a rank that was lost, and how to go on."""

import os
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dpp_lightning.cli.user_errors import guarded
from dpp_lightning.trainer.interruption import how_to_resume, lost_rank

SOURCE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "


@pytest.fixture
def second_rank(monkeypatch):
    """This process as rank 1 of a group."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


def fail_with(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(f"{SOURCE}Read error [10.0.0.1]:1: Connection reset by peer. This is typically caused by ..."),
            "(Read error [10.0.0.1]:1: Connection reset by peer)",
        ),
        (
            RuntimeError(f"{SOURCE}Connection closed by peer [10.0.0.1]:1"),
            "(Connection closed by peer [10.0.0.1]:1)",
        ),
        (
            RuntimeError(f"{SOURCE}Timed out waiting 1800000ms for recv operation to complete"),
            "(Timed out waiting 1800000ms for recv operation to complete)",
        ),
        (
            dist.DistBackendError("NCCL error: remote process exited or there was a network error\nLast error: ..."),
            "(NCCL error: remote process exited or there was a network error)",
        ),
        (
            dist.DistNetworkError("Connection was likely closed. Did the remote server shutdown or crash?"),
            "(Connection was likely closed)",
        ),
    ],
)
def test_the_loss_of_a_rank_is_a_message_and_a_code(error, reason, second_rank, capsys):
    error.add_note("To resume, ...")
    assert guarded("fit", fail_with(error)) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"dpp fit: failed: rank 1 lost another rank {reason}")
    assert message.endswith("To resume, ...\n")
    assert "Traceback" not in message


def test_ranks_that_do_not_meet_are_told_what_to_set(capsys):
    assert (
        guarded("fit", fail_with(RuntimeError("Gloo connectFullMesh failed with [/g.cc:1] timed out connecting"))) == 1
    )
    message = capsys.readouterr().err
    assert "the ranks cannot connect (Gloo connectFullMesh failed with timed out connecting)" in message
    assert "GLOO_SOCKET_IFNAME" in message


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection reset by peer"),  # of something else
        RuntimeError(f"{SOURCE}op.preamble.length <= op.nbytes. 4 vs 2"),  # ranks that disagree: a bug
        dist.DistBackendError("NCCL error: invalid usage"),
    ],
)
def test_other_errors_keep_their_traceback(error, second_rank):
    assert lost_rank(error) is None
    with pytest.raises(RuntimeError):
        guarded("fit", fail_with(error))


def test_a_traceback_on_request(second_rank, monkeypatch):
    monkeypatch.setenv("DPP_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="closed by peer"):
        guarded("fit", fail_with(RuntimeError(f"{SOURCE}Connection closed by peer")))


def stopped(folder, **state):
    """A trainer that was stopped in its second of three epochs."""
    running = {"current_epoch": 1, "max_epochs": 3, "global_step": 9, "max_steps": -1, "should_stop": False}
    saving = {"checkpoint_callbacks": [SimpleNamespace(dirpath=str(folder))], "ckpt_path": None, "is_global_zero": True}
    return SimpleNamespace(**(saving | running | state))


def test_a_folder_of_shards_that_was_not_finished_is_not_named(tmp_path):
    for age, name in enumerate(["torn.ckpt", "whole.ckpt"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (2000 - age, 2000 - age))
    (tmp_path / "whole.ckpt/meta.pt").touch()
    assert f"--ckpt_path {tmp_path / 'whole.ckpt'}\n" in how_to_resume(stopped(tmp_path), 1000)


def test_a_rank_without_checkpoints_says_who_has_them(tmp_path):
    assert "nothing to resume from" in how_to_resume(stopped(tmp_path), 0)
    assert "machine of rank 0" in how_to_resume(stopped(tmp_path, is_global_zero=False), 0)


@pytest.mark.parametrize("over", [{"current_epoch": 3}, {"max_steps": 9}, {"should_stop": True}])
def test_after_the_training_validate_prunes(over, tmp_path):
    (tmp_path / "last.ckpt").touch()
    assert "To resume, repeat" in how_to_resume(stopped(tmp_path), 0)
    assert "as dpp validate, with --ckpt_path" in how_to_resume(stopped(tmp_path, **over), 0)
