"""The package as strangers get it: what wheel and source archive hold, what they declare, and what they need."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ("dpp_lightning", "callbacks", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(kind, folder):
    """Build a ``wheel`` or ``sdist`` of a folder's sources by the declared backend, without network; the file."""
    call = f"from {PROJECT['build-system']['build-backend']} import build_{kind}; print(build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", call], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: a build leaves its folders behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    with ZipFile(build("wheel", source)) as archive:
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


def test_pages_for_readers_of_the_repository_stay_out_of_the_wheel(wheel):
    """The README of a folder links to files beside the package, which an installation has not."""
    assert not [name for name in wheel.namelist() if name.endswith(".md") and ".dist-info/" not in name]


@pytest.mark.slow
def test_source_archive_builds_the_same_wheel_and_twine_accepts_both(source, wheel, tmp_path):
    archive = build("sdist", source)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    rebuilt = build("wheel", unpacked)
    with ZipFile(rebuilt) as second:
        assert {e.filename: e.CRC for e in second.infolist()} == {e.filename: e.CRC for e in wheel.infolist()}
    checked = [sys.executable, "-m", "twine", "check", "--strict", str(archive), wheel.filename]
    done = subprocess.run(checked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2, done.stdout


def test_wheel_has_assets_well_under_a_megabyte(wheel):
    sizes = [entry.file_size for entry in wheel.infolist() if entry.filename.startswith("dpp_lightning/assets/")]
    assert sizes
    assert sum(sizes) < 1e6


def test_wheel_declares_the_command_and_the_license(wheel):
    (points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "dpp = dpp_lightning.cli:main" in wheel.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_metadata_says_what_the_package_needs_and_offers(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"completion", "dev", "eval", "serve", "tensorboard"}
    assert metadata["Requires-Python"] == ">=3.11"


def requirements(group):
    """Normalised distribution names of a list of requirements."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in group}


def imported_distributions():
    """Normalised names of the distributions that the package's modules import, wherever in a module they do."""
    modules = set()
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    known = packages_distributions()
    third_party = modules - sys.stdlib_module_names - {"dpp_lightning", "vllm"}  # vLLM is what loads its plugin
    return requirements(known.get(module, [module])[0] for module in third_party)


def test_every_import_is_declared_and_every_dependency_is_imported():
    project = PROJECT["project"]
    required, extras = requirements(project["dependencies"]), project["optional-dependencies"]
    imported = imported_distributions() - requirements(extras["eval"]) - requirements(extras["serve"])
    assert imported - required == set(), "imported but not declared"
    assert required - imported == set(), "declared but not imported"


def test_continuous_integration_runs_what_the_package_promises():
    """Each Python of the classifiers, and the oldest torch and transformers that the dependencies allow."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    promised = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert yaml.safe_load(workflow)["jobs"]["run"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["project"]["requires-python"] == f">={promised[0]}"
    oldest = dict(re.findall(r"'([\w-]+)==([\d.]+)\.\*'", workflow))
    assert oldest.keys() == {"torch", "torchvision", "transformers"}
    for name, version in oldest.items():
        assert f"{name}>={version}" in PROJECT["project"]["dependencies"]


def test_declared_packages_are_those_on_disk():
    settings = PROJECT["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "dpp_lightning").rglob("__init__.py")}
    on_disk = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
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
