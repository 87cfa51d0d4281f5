"""Two nodes, as users start them: torchrun on each, with a folder each, in one or two networks."""

import contextlib
import os
import shutil
import subprocess
import time

import pytest
import torch
from distjobs import free_port
from nodecases import DPP, Started, kept, node, quickstart, rows, weights

pytestmark = pytest.mark.distributed

STRATEGIES = {"ddp": ["--config", "multi_node.yaml"], "fsdp2": ["--config", "multi_node.yaml", "--config", "fsdp.yaml"]}
LIMIT = 240
LAST = "checkpoints/epoch=1-step=34.ckpt"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of the run in one process."""
    folder = tmp_path_factory.mktemp("single")
    done = Started([*DPP, "fit", *quickstart(32)], folder).wait(LIMIT)
    assert done.code == 0, done.err
    return folder


@contextlib.contextmanager
def started(commands, folders):
    """Both nodes, each in a folder of its own, as without a shared file system; none is left afterwards."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for command, folder in zip(commands, folders, strict=True):
            nodes.append(Started(command, folder))
            stack.callback(nodes[-1].kill)
        yield nodes


def fit(folders, *options, epochs=2):
    """How a fit on two nodes of this machine ended, on each."""
    port = free_port()
    with started([[*node(i, port), "fit", *quickstart(16, epochs), *options] for i in range(2)], folders) as nodes:
        return [process.wait(LIMIT) for process in nodes]


def apart(ours, theirs):
    """Relative distance of two sets of tensors."""
    squares = [((ours[name] - tensor).square().sum(), tensor.square().sum()) for name, tensor in theirs.items()]
    return float(sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5


def check_same(folder, single):
    """A run gave what one process gives: positions exactly, weights, values and scores but for rounding."""
    ours, theirs = kept(folder / "deltas"), kept(single / "deltas")
    assert ours.keys() == theirs.keys()
    assert len({name for name, _ in ours}) == 2
    for name, part in theirs.items():
        assert torch.equal(ours[name].indices, part.indices)
    assert apart(*({name: part.values for name, part in parts.items()} for parts in (ours, theirs))) < 0.02
    assert apart(weights(folder / LAST), weights(single / LAST)) < 1e-3
    assert rows(folder / "deltas") == pytest.approx(rows(single / "deltas"), abs=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_nodes_give_what_one_process_gives_and_node_0_holds_it(single, tmp_path, strategy):
    folders = [tmp_path / "a", tmp_path / "b"]
    for done in fit(folders, *STRATEGIES[strategy]):
        assert done.code == 0, done.err
        assert done.lingered < 10
    check_same(folders[0], single)
    assert list(folders[1].rglob("*")) == []


@pytest.mark.parametrize(("strategy", "given"), [("ddp", LAST), ("fsdp2", LAST), ("ddp", "last"), ("fsdp2", "last")])
def test_a_resume_needs_the_checkpoint_on_every_node(strategy, given, single, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    options = [f"--ckpt_path={given}", *STRATEGIES[strategy]]

    def copy(folder):
        checkpoint = folder / ("checkpoints/last.ckpt" if given == "last" else given)
        checkpoint.parent.mkdir(parents=True)
        shutil.copy(single / LAST, checkpoint)

    copy(folders[0])
    for rank, done in enumerate(fit(folders, *options, epochs=3)):
        assert done.code != 0
        assert f"dpp fit: error: rank {rank} finds {'no' if rank else 'the'} checkpoint --ckpt_path {given}" in done.err
        assert "put it in the same place on every node" in done.err
    if given == LAST:
        copy(folders[1])
        assert [done.code for done in fit(folders, *options, epochs=3)] == [0, 0]


@pytest.fixture
def networks():
    """Two network namespaces with an interface each, joined by a cable: (namespace, interface, address) of each."""
    tag = f"{os.getpid() % 100000}"
    ends = [(f"dpp-{tag}-{side}", f"dpp{tag}{side}", f"10.231.0.{i}") for i, side in enumerate("ab", 1)]
    (a, cable_a, _), (b, cable_b, _) = ends
    commands = [
        f"netns add {a}",
        f"netns add {b}",
        f"link add {cable_a} netns {a} type veth peer name {cable_b} netns {b}",
    ]
    for space, cable, address in ends:
        commands += [f"-n {space} addr add {address}/24 dev {cable}"]
        commands += [f"-n {space} link set {device} up" for device in ("lo", cable)]
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, timeout=30)
            if done.returncode:
                pytest.skip(f"this machine lets us make no networks: ip {command}: {done.stderr.strip()}")
        yield ends
    finally:
        for space, _, _ in ends:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=30)


def in_networks(networks, *environment):
    """The commands of a fit on two nodes that are in a network each; ``{}`` in the environment is the interface."""
    port, address = free_port(), networks[0][2]
    return [
        ["ip", "netns", "exec", space, "env", *(setting.format(cable) for setting in environment),
         *node(i, port, address), "fit", *quickstart(16), *STRATEGIES["ddp"]]
        for i, (space, cable, _) in enumerate(networks)
    ]  # fmt: skip


def test_two_nodes_in_two_networks(single, tmp_path, networks):
    folders = [tmp_path / "a", tmp_path / "b"]
    with started(in_networks(networks, "GLOO_SOCKET_IFNAME={}"), folders) as nodes:
        for done in [process.wait(LIMIT) for process in nodes]:
            assert done.code == 0, done.err
    check_same(folders[0], single)
    assert list(folders[1].rglob("*")) == []


def test_nodes_that_do_not_find_each_other_are_told_of_the_interface(tmp_path, networks):
    with started(in_networks(networks), [tmp_path / "a", tmp_path / "b"]) as nodes:
        until = time.monotonic() + LIMIT
        while all(one.process.poll() is None for one in nodes) and time.monotonic() < until:
            time.sleep(0.2)
        told = min(nodes, key=lambda one: one.process.returncode is None)  # the other is called, and waits half an hour
        done = told.wait(1)
    assert done.code == 1
    assert "dpp fit: failed: the ranks cannot connect" in done.err
    assert "GLOO_SOCKET_IFNAME" in done.err
