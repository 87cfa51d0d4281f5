"""What has not been tried on a GPU yet, on one device, in at most seven minutes: a Markdown table with a row for each case.

Run by hand: python tests/benchmarks/gpu_check.py [--minutes 7] [--parts tests,adamr] [--pretrained ENCODER --data GLUE].
It needs this checkout, Python and the packages of pyproject.toml; ``--missing`` lists those that are missing and how to
bring them. Nothing is downloaded or installed. Every part is a process of its own with a time limit, so that one that
fails, hangs or runs out of memory is a row of the table, and the others run. ``--device cpu --small`` tries the script
itself without a GPU, in two minutes. What each part does stands in gpu_parts.py.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DELTA = ["numpy", "filelock", "safetensors", "xxhash", "zstandard"]
FIT = [
    *DELTA,
    "accelerate",
    "datasets",
    "docstring_parser",
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "matplotlib",
]
FIT += ["peft", "rich", "scipy", "tokenizers", "torchmetrics", "torchvision", "transformers", "yaml"]


class Part(NamedTuple):
    """A row of the table of parts: seconds that it may take on a GPU, and the modules it needs beside torch."""

    limit: int
    needs: list[str]


PARTS = {
    "tests": Part(60, ["pytest", *FIT]),
    "adamr": Part(90, ["numpy"]),
    "delta": Part(60, DELTA),
    "quickstart": Part(45, [*FIT, "timm", "sklearn"]),
    "glue": Part(55, FIT),
    "fsdp": Part(55, FIT),
    "refit": Part(55, FIT),
}


def importable_package(folder: Path) -> str:
    """A folder for PYTHONPATH in which this checkout is ``dpp_lightning``, callbacks and configs included, by links."""
    package = folder / "package" / "dpp_lightning"
    package.mkdir(parents=True)
    for source in [*(ROOT / "dpp_lightning").iterdir(), ROOT / "callbacks", ROOT / "configs"]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return str(package.parent)


def missing_packages() -> list[str]:
    """The requirements of pyproject.toml, and pytest, that are not installed in a version that fits."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tests = [line for line in project["optional-dependencies"]["dev"] if line.startswith(("pytest", "hypothesis"))]
    missing = []
    for line in [*project["dependencies"], *tests]:
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(line)
    return missing


def how_to_bring(missing: list[str]) -> str:
    """Which packages are missing, which parts run without them, and the commands that bring them."""
    lacking = {name: [n for n in part.needs if find_spec(n) is None] for name, part in PARTS.items()}
    ready = [name for name, modules in lacking.items() if not modules]
    if not missing:
        return "Nothing is missing."
    quoted, python = " ".join(f"'{line}'" for line in missing), f"{sys.version_info[0]}.{sys.version_info[1]}"
    lines = [f"Missing: {', '.join(missing)}.", f"Parts that run without them: {', '.join(ready) or 'none'}."]
    lines += [f"With a network: pip install {quoted}"]
    lines += [f"Without one, on a machine that has one, with Python {python} and {platform.machine()} too:"]
    lines += ["  pip freeze | grep -i '^torch==' > same.txt     # the device's version of torch"]
    lines += [f"  pip download --dest wheels --constraint same.txt {quoted}"]
    lines += ["  rm -f wheels/torch-* wheels/nvidia* wheels/triton* wheels/cuda*     # the device has these"]
    lines += ["and on the device: pip install --no-index --no-deps wheels/*.whl"]
    return "\n".join(lines)


def run_part(name: str, options: argparse.Namespace, folder: Path, limit: float) -> list[dict]:
    """The rows of one part; whatever goes wrong in it is a row too."""
    lacking = [module for module in PARTS[name].needs if find_spec(module) is None]
    if lacking:
        return [{"case": "not run", "result": f"needs {', '.join(lacking)}"}]
    if limit < 5:
        return [{"case": "not run", "result": "no time was left"}]
    work = folder / name
    work.mkdir()
    rows, log = work / "rows.jsonl", work / "log.txt"
    rows.touch()
    command = [sys.executable, str(HERE / "gpu_parts.py"), name, "--rows", str(rows), "--device", options.device]
    command += ["--small"] if options.small else []
    command += ["--pretrained", options.pretrained, "--data", options.data] if options.pretrained else []
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=work, env=environment(options), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    if code is None:
        found.append({"case": "stopped", "result": f"took longer than {limit:.0f} s; last line: {last_line(log)}"})
    elif code:
        found.append({"case": "failed", "result": f"exit code {code}; last line: {last_line(log)}"})
    found.append({"case": "whole part", "seconds": time.monotonic() - start})
    return found


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The parts' environment: this checkout first on the path, no hub."""
    paths = [options.package, *(str(ROOT / "tests" / name) for name in ("support", "distributed"))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(paths)}


def stop(process: subprocess.Popen) -> None:
    """End a part with every process that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "none"


def markdown(name: str, row: dict) -> str:
    seconds, peak = row.get("seconds"), row.get("peak_mib")
    cells = [name, row["case"], row.get("result", ""), "" if seconds is None else f"{seconds:.3g}"]
    cells.append("" if peak is None else f"{peak:,.0f}")
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU works through in two minutes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default all, in this order")
    parser.add_argument("--minutes", type=float, default=7.0, help="of all parts together")
    parser.add_argument("--pretrained", help="a local folder with an encoder; default one of BERT-base's size, random")
    parser.add_argument("--data", help="a local folder with GLUE's sst2; needed with --pretrained")
    parser.add_argument("--output", help="a new folder for the table, logs and rows; default a temporary one")
    parser.add_argument("--missing", action="store_true", help="list the packages that are missing and stop")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    if (options.pretrained is None) != (options.data is None):
        parser.error("--pretrained and --data go together: give both or neither")
    for name in ("pretrained", "data"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            parser.error(f"--{name} {folder} is no folder")
        setattr(options, name, folder and str(Path(folder).resolve()))
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the parts in order and print the table as it grows; 1 where a part failed, was stopped or not run."""
    options = parse(argv)
    missing = missing_packages()
    if missing or options.missing:
        print(how_to_bring(missing), file=sys.stdout if options.missing else sys.stderr)
    if options.missing:
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was run; --device cpu --small tries the script itself", file=sys.stderr)
        return 2
    folder = Path(options.output or tempfile.mkdtemp(prefix="gpu_check-")).resolve()
    folder.mkdir(parents=True, exist_ok=bool(not options.output))
    options.package = importable_package(folder)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%d %B %Y')}"
    table = [f"{device}{', small sizes' if options.small else ''}, {versions}", ""]
    table += ["| part | case | result | seconds | peak MiB |", "|---|---|---|---|---|"]
    print("\n".join(table), flush=True)
    end, code = time.monotonic() + 60 * options.minutes, 0
    for name in options.parts.split(","):
        rows = run_part(name, options, folder, min(PARTS[name].limit, end - time.monotonic()))
        code |= any(row["case"] in ("not run", "failed", "stopped") for row in rows)
        lines = [markdown(name, row) for row in rows]
        print("\n".join(lines), flush=True)
        table += lines
        (folder / "table.md").write_text("\n".join(table) + "\n")
    print(f"\nlogs of the parts: {folder}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
