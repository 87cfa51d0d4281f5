"""The fuzz targets: on their seeds and some mutations, and for ten minutes each guided by coverage."""

import os
import subprocess
import sys
from pathlib import Path

import fuzz_delta
import fuzz_index
import fuzz_metadata
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


@pytest.mark.parametrize("module", [fuzz_metadata, fuzz_index])
def test_a_reader_stands_its_seeds_and_mutations_of_them(module):
    seeds = module.seeds()
    assert len(seeds) >= 5
    assert run_plain(module.target, seeds, module.PARTS, seconds=20, seed=0, most=300) == 300


@pytest.mark.slow
@pytest.mark.parametrize("module", [fuzz_delta, fuzz_metadata, fuzz_index])
def test_a_reader_stands_ten_minutes_of_fuzzing(module, tmp_path):
    """``DPP_FUZZ_SECONDS`` gives another time."""
    seconds = int(os.environ.get("DPP_FUZZ_SECONDS", "600"))
    script = Path(module.__file__)
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
