"""Claims: one holder at a time; that of a process or machine that is gone is taken over, that of one that lives never."""

import socket
import subprocess
import sys
import time

import pytest

from dpp_lightning.experiments import claims as module
from dpp_lightning.experiments.claims import Claims

HOLD = """
import sys, time
from pathlib import Path
from dpp_lightning.experiments.claims import Claims
claims = Claims(Path(sys.argv[1]))
assert claims.take("a")
print("held", flush=True)
time.sleep(60)
"""
TAKE = """
import sys
from pathlib import Path
from dpp_lightning.experiments.claims import Claims
folder = Path(sys.argv[1])
claims = [Claims(folder / str(number)) for number in range(20)]
for number in range(20):
    if claims[number].take("a"):
        (folder / f"taken{number}").open("a").write("x")
print("tried", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def short(monkeypatch):
    """Claims that are dead half a second after their last touch."""
    monkeypatch.setattr(module, "EXPIRES", 0.5)
    monkeypatch.setattr(module, "RENEWED", 0.1)


def on_another_machine(folder):
    """Make a claim look like one of a process on another machine."""
    (path,) = folder.iterdir()
    text = path.read_text()
    assert f"host={socket.gethostname()}" in text
    with path.open("r+") as file:  # the same file, which its holder goes on touching
        file.write(text.replace(f"host={socket.gethostname()}", f"host={'x' * len(socket.gethostname())}"))


def taken_within(claims, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if claims.take("a"):
            return True
        time.sleep(0.02)
    return False


def test_a_claim_has_one_holder_until_it_is_given_back(tmp_path):
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert first.take("a")
    assert first.take("a")
    assert not second.take("a")
    assert second.of_others("") == ["a"]
    assert first.of_others("") == []
    assert second.take("b")
    first.let_go("a")
    assert second.take("a")
    second.let_all_go()
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_one_takes_each_claim(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    takers = [subprocess.Popen([sys.executable, "-c", TAKE, str(tmp_path)], **pipes) for _ in range(3)]
    assert [taker.stdout.readline() for taker in takers] == [b"tried\n"] * 3
    for taker in takers:
        taker.communicate(b"\n")
    assert [(tmp_path / f"taken{number}").read_text() for number in range(20)] == ["x"] * 20


def test_the_claim_of_a_killed_process_is_taken_at_once(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    claims = Claims(tmp_path)
    assert not claims.take("a")
    owner.kill()
    owner.wait()
    assert claims.take("a")


def test_a_link_to_another_place_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "claims").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"):
        Claims(tmp_path / "claims")


@pytest.mark.parametrize("written", ["", "filelock/2\npid="], ids=["empty", "half"])
def test_a_claim_whose_maker_was_killed_while_it_wrote_is_no_ones(tmp_path, written):
    (tmp_path / "a").write_text(written)
    claims = Claims(tmp_path)
    assert not claims.take("a")  # it may be written at this moment
    assert claims.of_others("a") == []
    assert list(tmp_path.iterdir()) == []


def test_another_machine_takes_a_claim_over_only_when_its_holder_touches_it_no_more(tmp_path, short):
    living, other = Claims(tmp_path), Claims(tmp_path)
    assert living.take("a")
    on_another_machine(tmp_path)
    assert not taken_within(other, 1.5)
    heartbeat = living._leases["a"]._claim.heartbeat
    heartbeat.stop.set()
    heartbeat.thread.join()
    assert not taken_within(other, 0.2)
    assert taken_within(other, 3)
