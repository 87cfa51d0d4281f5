"""dpp fit with checkpoints on a disk that is full or broken, and killed at every call that changes the disk."""

import os
import re
import shutil

import pytest
import torch
import yaml
from fault_campaign import MODES, FaultServer, call_name, own_disk

pytestmark = pytest.mark.slow

MODULE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    def __init__(self, width: int = 400):
        super().__init__()
        self.layer = torch.nn.Linear(8, width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(16, 8)), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a module of three lines, in which the fit runs."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "line_module.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    """With everything imported that a fit needs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
        server = FaultServer(tmp_path_factory.mktemp("server"))
    root = tmp_path_factory.mktemp("warm")
    assert server.run(words(root), place, mode="warm")["code"] == 0
    yield server
    server.close()


def words(root):
    """A fit of three epochs that keeps the checkpoint of each, and the last one."""
    settings = {"dirpath": str(root / "kept"), "filename": "{epoch}", "save_top_k": -1, "save_last": True}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": settings}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    trainer = {"max_epochs": 3, "accelerator": "cpu", "default_root_dir": str(root), "callbacks": [saving], **quiet}
    config = {"seed_everything": 0, "model": {"class_path": "line_module.Line"}, "trainer": trainer}
    (root.parent / "fit.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", root.parent / "fit.yaml"]


def weights(root):
    """The weights of every checkpoint by its name; a version that Lightning counts up is left out of the name."""
    found = {}
    for path in sorted((root / "kept").glob("[!.]*.ckpt")):
        state = torch.load(path, weights_only=False)["state_dict"]
        found.setdefault(re.sub(r"-v\d+", "", path.name), []).append(state["layer.weight"])
    return found


def differences(root, wanted):
    """Checkpoints that are not those of the undisturbed fit."""
    try:
        there = weights(root)
    except Exception as error:
        return [f"a checkpoint cannot be read: {error}"]
    missing = [name for name in wanted if name not in there]
    return missing + [
        name for name, states in there.items() if not any(torch.equal(s, wanted[name][0]) for s in states)
    ]


def hidden(root):
    return [path.name for path in root.rglob(".*")]


@pytest.mark.parametrize("mode", MODES)
def test_every_checkpoint_is_whole(mode, place, server, tmp_path):
    root, faults = tmp_path / "root", []
    root.mkdir()
    undisturbed = server.run(words(root), place, root, "count")
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    wanted = weights(root)
    for number in range(1, len(undisturbed["calls"]) + 1):
        shutil.rmtree(root)
        root.mkdir()
        answer = server.run(words(root), place, root, mode, number)
        call = call_name(answer, number)
        if answer["code"]:
            found = partial(root, wanted) + (said(answer) if mode != "kill" else [])
        else:
            found = differences(root, wanted)
        if mode != "kill" and hidden(root) and not call.startswith("remove"):
            found.append(f"{hidden(root)} are left")
        again = server.run(words(root), place, root)
        if again["code"] or differences(root, wanted) or hidden(root):
            found.append(
                f"next: {again['code']}, {again['stderr'][-300:]!r}, {differences(root, wanted)}, {hidden(root)}"
            )
        faults += [f"{mode} at {number}, {call}: {fault}" for fault in found]
    print(f"fit, {mode}: {len(undisturbed['calls'])} runs, {len(faults)} faults")
    assert not faults, f"{len(faults)}\n" + "\n".join(faults[:60])


def partial(root, wanted):
    """What is wrong with the checkpoints of a fit that was stopped: each has the weights that some epoch had."""
    try:
        there = weights(root)
    except Exception as error:
        return [f"a checkpoint cannot be read: {error}"]
    known = [states[0] for states in wanted.values()]
    return [name for name, states in there.items() if not all(any(torch.equal(s, k) for k in known) for s in states)]


def said(answer):
    """What is wrong with what a fit said that met a fault."""
    lines = [line for line in answer["stderr"].splitlines() if line.startswith("dpp fit: ")]
    if answer["code"] != 1 or len(lines) != 1 or "Traceback" in answer["stderr"]:
        return [f"exit code {answer['code']}, said {answer['stderr'][-900:]!r}"]
    return []


def test_a_disk_that_gets_full_keeps_the_checkpoints_before(place, server, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    assert server.run(words(root), place)["code"] == 0
    wanted, size = weights(root), (root / "kept" / "last.ckpt").stat().st_size
    with own_disk(tmp_path / "full", 3 * size // 1024 + 8):
        answer = server.run(words(tmp_path / "full"), place)
        assert said(answer) == []
        assert "No space left on device" in answer["stderr"]
        there = weights(tmp_path / "full")
        assert 0 < sum(map(len, there.values())) < 4
        assert partial(tmp_path / "full", wanted) == hidden(tmp_path / "full") == []
