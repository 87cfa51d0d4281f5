"""Imports: they run one way between the rooms, as the contract in pyproject.toml says, and the package starts light."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpp_lightning"
MAPPED = ("callbacks", "configs")  # folders at the top that are sub-packages once installed
ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()} | {"callbacks"}
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
NOT_NEEDED = (  # for pruning in memory
    "datasets",
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "peft",
    "pytorch_lightning",
    "rich",
    "scipy",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
)


@pytest.fixture
def installed(tmp_path):
    """The package as an installation lays it out. On an editable one import-linter silently leaves out callbacks."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "dpp_lightning", ignore=ignored)
    for name in MAPPED:
        shutil.copytree(ROOT / name, tmp_path / "dpp_lightning" / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def run(code, folder=ROOT):
    """Python code in a fresh process that imports from a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_imports_run_one_way_and_in_no_circle(installed):
    done = run(LINT, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("path", "line", "importer", "imported"),
    [
        ("tensors/blocks.py", "import dpp_lightning.delta.sparse_delta", "tensors.blocks", "delta.sparse_delta"),
        ("pruning/scope.py", "from dpp_lightning.cli import exit_codes", "pruning.scope", "cli.exit_codes"),
        (
            "experiments/grid.py",
            "import dpp_lightning.callbacks.delta_prune",
            "experiments.grid",
            "callbacks.delta_prune",
        ),
        (
            "tasks/glue/data.py",
            "import dpp_lightning.callbacks.delta_prune",
            "tasks.glue.data",
            "callbacks.delta_prune",
        ),
        ("storage/hub.py", "    import dpp_lightning.merging.merge_deltas", "storage.hub", "merging.merge_deltas"),
    ],
)
def test_an_import_upward_breaks_the_contract_which_names_both_modules(installed, path, line, importer, imported):
    module = installed / "dpp_lightning" / path
    source = module.read_text(encoding="utf-8")
    indented = f"\n\ndef _late():\n{line}\n" if line.startswith(" ") else f"\n{line}\n"
    module.write_text(source + indented, encoding="utf-8")
    done = run(LINT, installed)
    assert done.returncode == 1
    assert "imports run one way BROKEN" in done.stdout
    assert f"dpp_lightning.{importer} -> dpp_lightning.{imported}" in done.stdout


def test_a_circle_inside_a_room_breaks_the_contract(installed):
    module = installed / "dpp_lightning" / "tensors" / "shards.py"
    module.write_text(module.read_text(encoding="utf-8") + "\nimport dpp_lightning.tensors.names\n", encoding="utf-8")
    done = run(LINT, installed)
    assert done.returncode == 1
    assert "no circles BROKEN" in done.stdout
    assert "No cycles are allowed in dpp_lightning.tensors." in done.stdout
    assert ".names" in done.stdout
    assert ".shards" in done.stdout


def test_every_module_of_every_room_is_analysed(installed):
    code = "from grimp import build_graph; print(*sorted(build_graph('dpp_lightning').modules))"
    analysed = set(run(code, installed).stdout.split())
    modules = {
        ".".join(path.relative_to(installed).with_suffix("").parts).removesuffix(".__init__")
        for path in (installed / "dpp_lightning").rglob("*.py")
    }
    assert analysed == modules
    assert {name.split(".")[1] for name in analysed if "." in name} >= ROOMS


def test_a_new_room_has_to_be_given_its_layer(installed):
    (installed / "dpp_lightning" / "attic").mkdir()
    (installed / "dpp_lightning" / "attic" / "__init__.py").touch()
    done = run(LINT, installed)
    assert done.returncode == 1
    assert "dpp_lightning.attic" in done.stdout


def test_at_most_six_files_lie_outside_the_rooms():
    assert len([path for path in PACKAGE.iterdir() if path.is_file() and not path.name.startswith(".")]) <= 6


def loaded(statement):
    """Top-level packages that a statement loads in a fresh process."""
    done = run(f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_pruning_in_memory_loads_torch_and_little_else():
    names = loaded("from dpp_lightning import METHODS, SparseDelta, merge, prune\nlist(METHODS)")
    assert "torch" in names
    assert names.isdisjoint(NOT_NEEDED), sorted(names.intersection(NOT_NEEDED))


@pytest.mark.parametrize("module", ["dpp_lightning", "dpp_lightning.configs", "dpp_lightning.cli"])
def test_a_bare_import_loads_no_torch(module):
    names = loaded(f"import {module}")
    assert "dpp_lightning" in names
    assert names.isdisjoint({"torch", "numpy", *NOT_NEEDED}), sorted(names.intersection({"torch", *NOT_NEEDED}))


def test_public_names_are_those_of_their_modules():
    import dpp_lightning

    for name in dpp_lightning.__all__:
        assert getattr(dpp_lightning, name) is not None
    assert dir(dpp_lightning) == sorted(dpp_lightning.__all__)
    with pytest.raises(AttributeError, match="it offers METHODS"):
        dpp_lightning.prun  # noqa: B018
