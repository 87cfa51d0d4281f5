"""What ends up in the wheel: the two mapped folders, the data files, and nothing else."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("dpp_lightning", "callbacks", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the declared backend from a copy of the sources (a build leaves its folders behind)."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from {PROJECT['build-system']['build-backend']} import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = source.glob("dist/*.whl")
    with ZipFile(path) as archive:
        yield archive


def installed_names(folder):
    """Names in the wheel of a folder's files: Python, YAML beside configs, and everything in assets."""
    prefix = folder if folder == "dpp_lightning" else f"dpp_lightning/{folder}"
    for path in (ROOT / folder).rglob("*"):
        shipped = path.suffix == ".py" or path.parent.name == "assets" or path.name == "py.typed"
        if (shipped or (folder == "configs" and path.suffix == ".yaml")) and path.is_file():
            yield f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}"


def test_wheel_holds_the_package_its_mapped_folders_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == {name for folder in SOURCES for name in installed_names(folder)}


@pytest.mark.parametrize(
    "name",
    [
        "callbacks/delta_prune.py",
        "configs/quickstart.yaml",
        "configs/bert_cola_adamr.yaml",
        "py.typed",
        "cli/commands.py",
    ],
)
def test_wheel_holds(name, wheel):
    assert f"dpp_lightning/{name}" in wheel.namelist()


def test_wheel_has_assets_well_under_a_megabyte(wheel):
    sizes = [entry.file_size for entry in wheel.infolist() if entry.filename.startswith("dpp_lightning/assets/")]
    assert sizes
    assert sum(sizes) < 1e6


def test_wheel_declares_the_command_and_the_license(wheel):
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "dpp = dpp_lightning.cli:main" in wheel.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_declared_packages_are_those_on_disk():
    settings = PROJECT["tool"]["setuptools"]
    own = {path.parent for path in (ROOT / "dpp_lightning").rglob("__init__.py")}
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in own}
    mapped = {
        ".".join(["dpp_lightning", *path.parent.relative_to(ROOT).parts])
        for name in ("callbacks", "configs")
        for path in (ROOT / name).rglob("__init__.py")
    }
    assert set(settings["packages"]) == on_disk | mapped
    assert {name: ROOT / folder for name, folder in settings["package-dir"].items()} == {
        "dpp_lightning": ROOT / "dpp_lightning",
        "dpp_lightning.callbacks": ROOT / "callbacks",
        "dpp_lightning.configs": ROOT / "configs",
    }


def test_callbacks_folder_refuses_to_be_imported_by_its_bare_name():
    spec = importlib.util.spec_from_file_location("callbacks", ROOT / "callbacks/__init__.py")
    with pytest.raises(ImportError, match=r"from dpp_lightning\.callbacks import DeltaPruneCallback"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
