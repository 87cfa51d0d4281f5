"""dpp sweep with a kill, a full disk and a broken disk at every call that changes the disk, and killed at any time."""

import random
import re
import shutil
import time

import pytest
from fault_campaign import MODES, FaultServer, call_name
from sweep_job import fitted, sweep_result

from dpp_lightning import SparseDelta

pytestmark = pytest.mark.slow

WORDS = ["--methods", "dare", "--rates", "0.5", "0.9", "--seeds", "0"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A config and the checkpoint of a fit of a tiny BERT: the arguments of a sweep but for grid and output."""
    with fitted(tmp_path_factory.mktemp("job"), 1, (40, 16)) as words:
        yield ["sweep", *words, *WORDS, "--output"]


@pytest.fixture(scope="module")
def server(job, tmp_path_factory):
    """With everything imported that a sweep needs."""
    server = FaultServer(tmp_path_factory.mktemp("server"))
    place = tmp_path_factory.mktemp("warm")
    assert server.run([*job, place / "sweep"], place, mode="warm")["code"] == 0
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(job, server, tmp_path_factory):
    """The result of an undisturbed sweep, the calls it makes and the seconds it takes."""
    root = tmp_path_factory.mktemp("whole")
    start = time.perf_counter()
    answer = server.run([*job, root / "sweep"], root, root, "count")
    assert answer["code"] == 0, answer["stderr"]
    return sweep_result(root / "sweep"), answer["calls"], time.perf_counter() - start


def differences(folder, wanted):
    """What of a sweep's result is not that of the undisturbed one."""
    there = sweep_result(folder)
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
