"""The fuzz target of the delta reader: on its seeds and some mutations, and for ten minutes guided by coverage."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_delta
import pytest
from harness import pack, run_plain, unpack


def test_the_seeds_are_read_and_mutations_of_them_refused_or_valid():
    seeds = fuzz_delta.seeds()
    assert len(seeds) >= 12
    for seed in seeds:
        assert pack(unpack(seed, fuzz_delta.PARTS)) == seed
        assert fuzz_delta.outcome(
            lambda data=seed: fuzz_delta.SparseDelta.from_bytes(*fuzz_delta.files_of(*unpack(data, 5)))
        )
    assert run_plain(fuzz_delta.target, seeds, fuzz_delta.PARTS, seconds=20, seed=0, most=300) == 300


@pytest.mark.slow
def test_the_delta_reader_stands_ten_minutes_of_fuzzing(tmp_path):
    """``DPP_FUZZ_SECONDS`` gives another time."""
    seconds = int(os.environ.get("DPP_FUZZ_SECONDS", "600"))
    script = Path(__file__).with_name("fuzz_delta.py")
    run = subprocess.run(
        [sys.executable, str(script), f"-max_total_time={seconds}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # where an input that fails is left
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(script.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        },
    )
    assert run.returncode == 0, run.stderr[-4000:]
