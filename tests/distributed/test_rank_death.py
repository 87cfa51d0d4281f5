"""A rank that dies: the others end soon with a message, whatever was written is whole, and the run goes on from it."""

import re

import pytest
import torch
from nodecases import DPP, TORCHRUN, Started, kept, quickstart, rows, weights

LIMIT = 180
LAUNCHERS = {
    "dpp": [*DPP, "fit"],
    "torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "dpp_lightning", "fit"],
}
TWO_RANKS = ["--config", "ddp.yaml", "--trainer.devices=2"]
LAST = "checkpoints/epoch=1-step=34.ckpt"


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
    assert f"dpp fit: failed: rank {1 - rank} lost another rank" in done.err
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
