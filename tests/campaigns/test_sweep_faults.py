"""dpp sweep with a kill, a full disk and a broken disk at every call that changes the disk, and killed at any time."""

import json
import random
import re
import shutil
import time
from contextlib import redirect_stderr

import datasets
import pytest
import yaml
from fault_campaign import MODES, FaultServer, call_name
from tiny_glue import make_data, make_model

from dpp_lightning import SparseDelta
from dpp_lightning.cli import main

pytestmark = pytest.mark.slow

WORDS = ["--methods", "dare", "--rates", "0.5", "0.9", "--seeds", "0"]
MEASURED = ("seconds", "forwards")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A config and the checkpoint of a fit of a tiny BERT: the arguments of a sweep but for grid and output."""
    folder = tmp_path_factory.mktemp("job")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    checkpoint = {"dirpath": str(folder), "filename": "last", "save_weights_only": True}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    model = {"task": "sst2", "pretrained": make_model(folder / "base")}
    data = {"path": make_data(folder / "data", "sst2", 40, 16)}
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": [saving], **quiet},
        "model": {"class_path": "GLUEModule", "init_args": model},
        "data": {"class_path": "GLUEDataModule", "init_args": data},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    with (folder / "stderr.txt").open("w") as file, redirect_stderr(file):
        assert main(["fit", "--config", str(folder / "fit.yaml"), "--trainer.default_root_dir", str(folder)]) == 0
    yield ["sweep", "--config", folder / "fit.yaml", "--ckpt_path", folder / "last.ckpt", *WORDS, "--output"]
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="module")
def server(job, tmp_path_factory):
    """With everything imported that a sweep needs."""
    server = FaultServer(tmp_path_factory.mktemp("server"))
    place = tmp_path_factory.mktemp("warm")
    assert server.run([*job, place / "sweep"], place, mode="warm")["code"] == 0
    yield server
    server.close()


def result(folder):
    """What a sweep has made, without the times: names of all files, rows, table, bytes of the deltas."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    rows = [json.loads(line) for line in files["results.jsonl"].read_text().splitlines()]
    for row in rows:
        for name in MEASURED:
            row.pop(name, None)
    cells = [line.split("|") for line in files["table.md"].read_text().splitlines()]
    measured = next(k for k, name in enumerate(next(c for c in cells if len(c) > 3)) if name.strip() == "seconds")
    table = [[cell for k, cell in enumerate(line) if len(line) < 4 or k != measured] for line in cells]
    deltas = {name: path.read_bytes() for name, path in files.items() if "delta_" in name}
    return {"files": sorted(files), "rows": rows, "table": table, "deltas": deltas}


@pytest.fixture(scope="module")
def whole(job, server, tmp_path_factory):
    """The result of an undisturbed sweep, the calls it makes and the seconds it takes."""
    root = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    answer = server.run([*job, root / "sweep"], root, root, "count")
    assert answer["code"] == 0, answer["stderr"]
    return result(root / "sweep"), answer["calls"], time.perf_counter() - start


def differences(folder, wanted):
    """What of a sweep's result is not that of the undisturbed one."""
    there = result(folder)
    return [f"{name}: {there[name]!r:.300}" for name in wanted if there[name] != wanted[name]]


def torn(folder):
    """Folders and files under their final names that are not whole; a last line of the rows may be torn."""
    found = []
    for path in folder.glob("[!.]*/delta_config.json"):
        try:
            SparseDelta.from_pretrained(path.parent)
        except (OSError, ValueError) as error:
            found.append(f"{path.parent.name}: {error}")
    return found + [p.name for p in folder.glob("[!.]*.png") if not p.read_bytes().endswith(b"IEND\xaeB`\x82")]


def again(job, server, root, wanted):
    """What is wrong after the same command was given again."""
    answer = server.run([*job, root / "sweep"], root)
    if answer["code"]:
        return [f"next: exit code {answer['code']}, said {answer['stderr'][-400:]!r}"]
    return [f"next: {text}" for text in differences(root / "sweep", wanted)]


def said(answer):
    """What is wrong with what a sweep said that met a fault."""
    lines = [line for line in answer["stderr"].splitlines() if line.startswith("dpp sweep: ")]
    if answer["code"] != 1 or len(lines) != 1 or not lines[0].startswith("dpp sweep: failed: "):
        return [f"exit code {answer['code']}, said {answer['stderr'][-900:]!r}"]
    return ["a traceback"] if "Traceback" in answer["stderr"] else []


@pytest.mark.parametrize("mode", MODES)
def test_a_sweep_goes_on_after_a_fault(mode, job, server, whole, tmp_path):
    wanted, calls, _ = whole
    faults, root, tried = [], tmp_path / "root", 0
    for number in range(1, len(calls) + 1):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        answer = server.run([*job, root / "sweep"], root, root, mode, number)
        tried += 1
        call = call_name(answer, number)
        found = torn(root / "sweep")
        if answer["code"] == 0:  # what could not be removed is there until the next run
            found += [] if call.startswith("remove") else differences(root / "sweep", wanted)
        elif mode != "kill":
            found += said(answer)
        found += again(job, server, root, wanted)
        faults += [f"{mode} at {number}, {call}: {fault}" for fault in found]
    print(f"sweep, {mode}: {tried} runs, {len(faults)} faults")
    assert not faults, f"{len(faults)} of {tried}\n" + "\n".join(faults[:60])


def test_a_sweep_goes_on_after_thirty_kills_at_random_times(job, server, whole, tmp_path):
    wanted, _, seconds = whole
    faults, rng = [], random.Random(0)
    for number in range(30):
        root = tmp_path / str(number)
        root.mkdir()
        answer = server.run([*job, root / "sweep"], root, seconds=rng.uniform(0.01, seconds))
        assert answer["code"] in (0, -9)
        faults += [re.sub(r"^", f"kill {number}: ", f) for f in torn(root / "sweep") + again(job, server, root, wanted)]
    print(f"sweep, random kills: 30 runs, {len(faults)} faults")
    assert not faults, "\n".join(faults)
