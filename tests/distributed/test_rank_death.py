"""A rank that dies: the others end soon with a message, whatever was written is whole, and the run goes on from it."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from nodecases import DPP, TORCHRUN, Started, kept, quickstart, rows, weights

from dpp_lightning.cli.lightning import guarded
from dpp_lightning.trainer.checkpoint_io import AtomicCheckpointIO
from dpp_lightning.trainer.interruption import how_to_resume, lost_rank

LIMIT = 180
LAUNCHERS = {
    "dpp": [*DPP, "fit"],
    "torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "dpp_lightning", "fit"],
}
TWO_RANKS = ["--config", "ddp.yaml", "--trainer.devices=2"]
LAST = "checkpoints/epoch=1-step=34.ckpt"
SOURCE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "


# --- what is said ---------------------------------------------------------------------------------------------------


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
    said = capsys.readouterr().err
    assert said.startswith(f"dpp fit: error: rank 1 lost another rank {reason}")
    assert said.endswith("To resume, ...\n")
    assert "Traceback" not in said


def test_ranks_that_do_not_meet_are_told_what_to_set(capsys):
    assert (
        guarded("fit", fail_with(RuntimeError("Gloo connectFullMesh failed with [/g.cc:1] timed out connecting"))) == 1
    )
    said = capsys.readouterr().err
    assert "the ranks cannot connect (Gloo connectFullMesh failed with timed out connecting)" in said
    assert "GLOO_SOCKET_IFNAME" in said


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
    place = {"checkpoint_callbacks": [SimpleNamespace(dirpath=str(folder))], "ckpt_path": None, "is_global_zero": True}
    return SimpleNamespace(**(place | running | state))


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


def test_a_save_that_is_broken_off_leaves_the_former_checkpoint_and_nothing_that_looks_like_one(tmp_path, monkeypatch):
    saver, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": 1}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]

    def tear(checkpoint, place):
        place.write_bytes(b"half")
        assert place.parent == tmp_path, "on the file system of the final name"
        assert place.suffix != ".ckpt"
        raise OSError("no space left")

    monkeypatch.setattr("dpp_lightning.trainer.checkpoint_io.torch.save", tear)
    with pytest.raises(OSError, match="no space"):
        saver.save_checkpoint({"step": 2}, path)
    assert saver.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


# --- what happens ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """The folder of a run on two ranks that both live."""
    folder = tmp_path_factory.mktemp("unharmed")
    done = Started([*LAUNCHERS["torchrun"], *quickstart(16), *TWO_RANKS], folder).wait(LIMIT)
    assert done.code == 0, done.err
    return folder


def kill(launcher, folder, rank, strategy=TWO_RANKS, **when):
    """How a run ended of which one rank was killed; everything under a final name is whole."""
    killer = ["--trainer.callbacks+=nodecases.Kill", f"--trainer.callbacks.rank={rank}"]
    killer += [f"--trainer.callbacks.{name}={number}" for name, number in when.items()]
    done = Started([*LAUNCHERS[launcher], *quickstart(16), *strategy, *killer], folder).wait(LIMIT)
    assert done.code != 0
    assert done.lingered < 10
    assert f"dpp fit: error: rank {1 - rank} lost another rank" in done.err
    assert done.err.count("Traceback") == (launcher == "torchrun")  # its own, with its report
    assert ("SIGKILL" in done.err) == (launcher == "torchrun")
    for checkpoint in folder.rglob("*.ckpt"):
        assert weights(checkpoint)
    kept(folder / "deltas")
    return done


def check_same(folder, unharmed):
    """Weights and deltas are those of the run that nothing happened to."""
    tolerance = {"rtol": 0, "atol": 0}
    for name, tensor in weights(unharmed / LAST).items():
        torch.testing.assert_close(weights(folder / LAST)[name], tensor, **tolerance)
    ours, theirs = kept(folder / "deltas"), kept(unharmed / "deltas")
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        assert torch.equal(ours[name].indices, part.indices)
        torch.testing.assert_close(ours[name].values, part.values, **tolerance)
    assert rows(folder / "deltas") == rows(unharmed / "deltas")


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_killed_in_training(launcher, rank, unharmed, tmp_path):
    done = kill(launcher, tmp_path, rank, step=21)
    (checkpoint,) = re.findall(r"To resume, repeat the command with --ckpt_path (\S+)", done.err)
    assert checkpoint == "checkpoints/epoch=0-step=17.ckpt"
    resume = [*LAUNCHERS[launcher], *quickstart(16), *TWO_RANKS, "--ckpt_path", checkpoint]
    resumed = Started(resume, tmp_path).wait(LIMIT)
    assert resumed.code == 0, resumed.err
    check_same(tmp_path, unharmed)


@pytest.mark.distributed
def test_a_rank_killed_in_training_on_shards(tmp_path):
    shards = ["--config", "fsdp.yaml", "--trainer.devices=2"]
    run = [*LAUNCHERS["dpp"], *quickstart(16), *shards]
    assert Started(run, tmp_path / "unharmed").wait(LIMIT).code == 0
    done = kill("dpp", tmp_path / "killed", 0, shards, step=21)
    (checkpoint,) = re.findall(r"To resume, repeat the command with --ckpt_path (\S+)", done.err)
    assert Started([*run, "--ckpt_path", checkpoint], tmp_path / "killed").wait(LIMIT).code == 0
    check_same(tmp_path / "killed", tmp_path / "unharmed")


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "rank"), [("dpp", 0), ("torchrun", 1)])
def test_a_rank_killed_while_deltas_are_scored(launcher, rank, unharmed, tmp_path):
    done = kill(launcher, tmp_path, rank, passes=3)  # base, fine-tuned, the first of two deltas
    assert len({name for name, _ in kept(tmp_path / "deltas")}) == 1
    (checkpoint,) = re.findall(r"as dpp validate, with --ckpt_path (\S+)", done.err)
    validate = [*LAUNCHERS[launcher][:-1], "validate", *quickstart(16, resume="true"), *TWO_RANKS]
    resumed = Started([*validate, "--ckpt_path", checkpoint], tmp_path).wait(LIMIT)
    assert resumed.code == 0, resumed.err
    check_same(tmp_path, unharmed)


@pytest.mark.distributed
def test_torchrun_starts_the_ranks_again_where_the_last_checkpoint_was(unharmed, tmp_path):
    restart = [*LAUNCHERS["torchrun"]]
    restart.insert(restart.index("-m", 3), "--max_restarts=1")
    keep_last = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    killer = ["--trainer.callbacks+=nodecases.Kill", "--trainer.callbacks.rank=1", "--trainer.callbacks.step=21"]
    options = [*quickstart(16), *TWO_RANKS, *keep_last, *killer, "--ckpt_path=last"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else the new ranks read the dead ones' addresses in it
    done = Started([*restart, *options], tmp_path, **own_store).wait(LIMIT)
    assert done.code == 0, done.err
    assert "Restoring states from the checkpoint path at" in done.err
    check_same(tmp_path, unharmed)
