"""Tiny random models of many architectures through every road from two models to a pruned one, as a table in Markdown.

python tests/benchmarks/bench_architectures.py [NAME ...] [--kind KIND] [--output TABLE.md] [--checks CHECK ...]

Rows and checks are those of ``tests/support/architectures.py`` and ``architecture_checks.py``. Everything runs in one
process on one thread, at most a minute an architecture; models and deltas lie in a temporary folder. The exit code is 1
where anything failed.
"""

import argparse
import datetime
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import lightning
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from architecture_checks import CALIBRATED, CHECKS, METHODS, TRAINED, Cell, run_checks
from architectures import ARCHITECTURES, Architecture

COLUMNS = {  # heading to its checks
    "rate 0": ("rate 0",),
    "`apply_`": ("apply_",),
    "modules": ("modules", "state dicts"),
    "callback": ("validate", "fit"),
    "`.ckpt`": (".ckpt",),
    "export": ("export", "export --base"),
    "methods": METHODS,
    "linear": ("linear",),
    "calibrated": CALIBRATED,
    "trained": TRAINED,
    "inspect": ("inspect",),
    "merge": ("merge",),
}
Results = dict[str, dict[str, Cell]]  # architecture to check to outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; default all")
    parser.add_argument("--kind", help="only those of this kind")
    parser.add_argument("--output", type=Path, help="file of the table; default the screen")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [ARCHITECTURES[name] for name in options.names or ARCHITECTURES]
    rows = [row for row in rows if options.kind in (None, row.kind)]
    results, start = {}, time.perf_counter()
    for number, row in enumerate(rows, 1):
        results[row.name] = run(row, tuple(options.checks), f"{number}/{len(rows)}")
    text = table(rows, results, time.perf_counter() - start)
    if options.output:
        options.output.write_text(text)
    else:
        print(text)
    return int(any(cell.state == "FAIL" for cells in results.values() for cell in cells.values()))


def run(row: Architecture, checks: tuple[str, ...], number: str) -> dict[str, Cell]:
    """One architecture in a folder of its own; what is not right goes to the screen at once."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cells = run_checks(row, Path(folder), checks)
    bad = {name: cell for name, cell in cells.items() if cell.state != "ok"}
    print(f"{number} {row.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    for name, cell in bad.items():
        print(f"    {name}: {cell.state}: {cell.note}", file=sys.stderr, flush=True)
    return cells


def table(rows: list[Architecture], results: Results, seconds: float) -> str:
    """The Markdown: what was run and where, a row for each architecture, and every note once below, without the names
    of tensors (those are on the screen)."""
    states = [cell.state for cells in results.values() for cell in cells.values()]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "refused", "FAIL"))
    lines = [
        f"{len(rows)} architectures, {len(states)} checks: {counts}. {datetime.date.today():%d %B %Y}, "
        f"{platform.system()} {platform.machine()}, one thread, {seconds:.0f} s; torch {torch.__version__.split('+')[0]}, "
        f"transformers {transformers.__version__}, lightning {lightning.__version__}.",
        "",
        "| | class | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    notes: dict[str, int] = {}
    kind = ""
    for row in rows:
        if row.kind != kind:
            kind = row.kind
            lines.append(f"| **{kind}** |" + " |" * (len(COLUMNS) + 1))
        cells = [_column(results[row.name], checks, notes) for checks in COLUMNS.values()]
        lines.append(f"| {row.name} | `{row.class_name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())]).rstrip() + "\n"


def _column(cells: dict[str, Cell], checks: tuple[str, ...], notes: dict[str, int]) -> str:
    """A cell of the table for several checks: the worst state, and the numbers of their notes."""
    present = {name: cells[name] for name in checks if name in cells}
    if not present:
        return ""
    worst = max((cell.state for cell in present.values()), key=["ok", "refused", "FAIL"].index)
    told = [f"{name}: {cell.state}: {_without_names(cell)}" for name, cell in present.items() if cell.note]
    return " ".join([worst, *(f"[{notes.setdefault(note, len(notes) + 1)}]" for note in told)])


def _without_names(cell: Cell) -> str:
    """A note as it is the same of every model; of a failure all of it."""
    if cell.state == "FAIL":
        return cell.note
    plain = re.sub(r" \([^)]*\)|: [\w.]+\.\w[\w., ]*?(?=\. [A-Z]|$)", "", cell.note)
    return re.sub(r"\d+ of \d+", "n of m", plain)


if __name__ == "__main__":
    sys.exit(main())
