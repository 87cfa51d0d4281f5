"""A package of somebody else adds a method: installed with pip, its entry point is found by every door."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dpp_lightning import METHODS, SparseDelta

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "dpp-every-other"
version = "1.0"

[project.entry-points."dpp_lightning.methods"]
every-other = "every_other:METHOD"
torn = "every_other:ABSENT"

[tool.setuptools]
py-modules = ["every_other"]
"""

MODULE = """
import torch

from dpp_lightning import Method
from dpp_lightning.methods import KeptEntries


def select(pairs, pruning_rate, seed, *, first: int = 0):
    for pair in pairs:
        yield KeptEntries(torch.arange(int(first), pair.numel, 2))


METHOD = Method(select, lambda pruning_rate: 1.0, "Every second entry", "https://example.org/every-other", random=False)
"""

FROM_PYTHON = """
import warnings

import torch

from dpp_lightning import METHODS, SparseDelta, prune

base = {"weight": torch.zeros(2, 3)}
finetuned = {"weight": torch.arange(1.0, 7.0).view(2, 3)}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert "every-other" in METHODS
    assert "torn" not in METHODS
assert METHODS["every-other"].paper == "Every second entry"
for warning in caught:
    print(warning.message)
delta = prune(base, finetuned, "every-other", 0.5, first=1)
assert delta.tensors["weight"].values.tolist() == [2.0, 4.0, 6.0]
delta.save_pretrained("from_python")
assert SparseDelta.from_pretrained("from_python").info.method == "every-other"
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """A folder for ``PYTHONPATH`` that pip has installed the package into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("plugins")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "every_other.py").write_text(MODULE)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run(plugins, folder, *arguments):
    """Python in a fresh process that finds the plug-in."""
    environment = {**os.environ, "PYTHONPATH": str(plugins)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_its_method_prunes_from_python_and_a_broken_one_is_named(plugins, tmp_path):
    done = run(plugins, tmp_path, "-c", FROM_PYTHON)
    (warning,) = done.stdout.splitlines()
    assert warning.startswith("method 'torn' of every_other:ABSENT is left out: ")
    assert "ABSENT" in warning.partition(": ")[2]


def test_its_method_prunes_on_the_command_line_and_the_delta_is_read_without_it(plugins, tmp_path):
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "base.safetensors")
    save_file({"weight": torch.arange(1.0, 7.0).view(2, 3)}, tmp_path / "finetuned.safetensors")
    command = ["prune", "base.safetensors", "finetuned.safetensors", "--method", "every-other", "--output", "delta"]
    settings = ["--pruning_rate", "0.5", "--method_settings.first", "1"]
    done = run(plugins, tmp_path, "-m", "dpp_lightning", *command, *settings)
    assert "method 'torn' of every_other:ABSENT is left out" in done.stderr
    assert "every-other" not in METHODS
    delta = SparseDelta.from_pretrained(tmp_path / "delta")
    assert delta.info.method == "every-other"
    assert delta.tensors["weight"].values.tolist() == [2.0, 4.0, 6.0]
