"""What a busy machine costs: the quickstart, an epoch of the math recipe's stand-in and some tests beside busy processes.

Run by hand on an otherwise idle machine: python tests/benchmarks/bench_busy.py --data GSM8K [--busy 0 1 2]
[--policies passive spinning] [--tests tests/tasks/test_causal_lm.py] [--problems 600]. A busy process counts without end,
one a core. ``spinning`` has OpenMP's threads spin as libgomp does where OMP_WAIT_POLICY is not set; ``dpp`` and the tests
set ``passive`` there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that count."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(command: list[str], policy: str, folder: Path, log: Path) -> float:
    spins = {} if policy == "passive" else {"GOMP_SPINCOUNT": "300000"}  # which goes before the policy
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **spins}
    start = time.perf_counter()
    with log.open("ab") as file:
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=file, stderr=file)
    return time.perf_counter() - start


def prepared(data: str, problems: int, folder: Path) -> list[str]:
    """Make base and data of the math task; the command of its fit."""
    base, made = folder / "base", folder / "problems"
    for script, words in (
        ("math_base.py", ["--data", data, "--output", str(base), "--epochs", "0"]),
        ("word_problems.py", ["--output", str(made), "--train", str(problems), "--test", "20"]),
    ):
        subprocess.run([sys.executable, str(HERE / script), *words], check=True, stdout=subprocess.DEVNULL)
    return [
        sys.executable, "-m", "dpp_lightning", "fit", "--config", "qwen2_0.5b_metamath_adamr.yaml",
        "--model.pretrained", str(base), "--data.path", str(made / "train.jsonl"), "--trainer.max_epochs", "1",
        "--data.test_path", str(made / "test.jsonl"), "--trainer.callbacks", "[]", "--trainer.logger", "false",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of GSM8K in the hub's layout")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", default=["passive", "spinning"])
    parser.add_argument("--tests", nargs="+", default=["tests/tasks/test_causal_lm.py"])
    parser.add_argument("--problems", type=int, default=600)
    options = parser.parse_args()
    repository = HERE.parents[1]
    tests = [str(repository / path) for path in options.tests]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "an epoch of the math stand-in": prepared(options.data, options.problems, folder),
            "the quickstart": [sys.executable, "-m", "dpp_lightning", "fit", "--config", "quickstart.yaml"],
            " ".join(options.tests): [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-c",
                str(repository / "pyproject.toml"),
                *tests,
            ],
        }
        print(f"| | waiting | {' | '.join(f'{count} busy' for count in options.busy)} |")
        print("|---|---" + "|---" * len(options.busy) + "|")
        for title, command in commands.items():
            for policy in options.policies:
                times = []
                for count in options.busy:
                    with busy(count):
                        times.append(seconds(command, policy, folder, folder / "log.txt"))
                cells = " | ".join(f"{t:.0f} s ({t / times[0]:.1f})" for t in times)
                print(f"| {title} | {policy} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
