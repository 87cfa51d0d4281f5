"""Every command that writes a folder, with a kill, a full disk and a broken disk at each call that changes the disk."""

import pytest
from command_inputs import make_inputs
from fault_campaign import MODES, Campaign, FaultServer, held, own_disk

from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint

pytestmark = pytest.mark.slow

COMMANDS = {
    "prune": "prune base tuned --seed {seed} --output {{root}}/out",
    "merge": "merge base a b --scale {seed}.5 --output {{root}}/out",
    "merge --dense": "merge base a b --scale {seed}.5 --output {{root}}/out --dense {{root}}/dense",
    "apply": "apply base a --max_shard_bytes {seed}0000 --output {{root}}/out",
    "export": "export last.ckpt --max_shard_bytes {seed}0000 --output {{root}}/out",
    "export --peft": "export low{seed} --peft --output {{root}}/out",
    "export --base": "export last.ckpt --base base --seed {seed} --output {{root}}/out",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base, a classifier fine-tuned from it, as a folder and a checkpoint, and deltas with heads of their own."""
    place = make_inputs(tmp_path_factory.mktemp("inputs"))
    low = PruningSpec("lowrank", method_settings={"rank": 2})
    for k, name in enumerate(("tuned", "other")):
        prune_checkpoint(place / "base", place / name, place / f"low{k + 1}", low)
    return place


@pytest.fixture(scope="module")
def server(inputs, tmp_path_factory):
    """With everything imported that the commands need."""
    server = FaultServer(tmp_path_factory.mktemp("server"))
    for number, command in enumerate(COMMANDS.values()):
        root = tmp_path_factory.mktemp(f"warm{number}")
        words = command.format(seed=1).format(root=root).split()
        assert server.run(words, inputs, mode="warm")["code"] == 0
    yield server
    server.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("there", ["new", "older"])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_is_whole_or_the_older_one(name, there, mode, inputs, server, tmp_path):
    root = tmp_path / "root"
    older = {}
    if there == "older":
        words = COMMANDS[name].format(seed=2).format(root=tmp_path / "older").split()
        assert server.run(words, inputs)["code"] == 0
        older = {p.name: held(p) for p in (tmp_path / "older").iterdir()}
    words = COMMANDS[name].format(seed=1).split() + (["--overwrite"] if older else [])
    campaign = Campaign(server, words, inputs, root, older)
    campaign.run(mode)
    print(f"{name}, {there}, {mode}: {campaign.tried} runs, {len(campaign.faults)} faults")
    assert not campaign.faults, f"{len(campaign.faults)} of {campaign.tried}\n" + "\n".join(campaign.faults[:60])


@pytest.mark.parametrize("there", ["new", "older"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_place_is_refused_in_one_line(name, there, inputs, server, tmp_path):
    root = tmp_path / "root"
    with own_disk(root, 4000) as make_read_only:
        words = COMMANDS[name].format(seed=2).format(root=root).split()
        if there == "older":
            assert server.run(words, inputs)["code"] == 0
        before = held(root)
        make_read_only()
        answer = server.run([*words, *(["--overwrite"] if before else [])], inputs)
        assert (answer["code"], held(root)) == (2, before)
        (line,) = answer["stderr"].splitlines()
        assert line.startswith(f"dpp {words[0]}: error: --output {root}/out cannot be made: cannot write into")
        assert "Read-only file system" in line


def test_thirty_exports_killed_at_random_times(inputs, server, tmp_path):
    words = COMMANDS["export"].format(seed=1).split()
    campaign = Campaign(server, words, inputs, tmp_path / "root")
    campaign.run_killed_at_random_times(30)
    print(f"export, random kills: {campaign.tried} runs, {len(campaign.faults)} faults")
    assert not campaign.faults, "\n".join(campaign.faults)
