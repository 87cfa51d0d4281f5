"""How time and memory grow: over the size of the model, the number of deltas merged and the rows of a sweep.

Run by hand: python tests/benchmarks/bench_growth.py [--billions 0.02 0.1 0.3 1 3] [--deltas 2 4 8 16] [--rows 4 8 16 32]
[--repeats 1] [--folder DIR] [--picture growth.png]. Models are Llama-shaped bfloat16 pairs, p = 0.99; merges are of
deltas of the smallest size, each drawn by a seed of its own; the sweep's rows are mask seeds of a small network. Every
run is a process of its own that reports its CPU seconds and the peak of RssAnon (private memory) above that of the
interpreter with the library imported, so that other processes on the machine disturb little. The exponent is the slope
of the least-squares line through the logarithms: 1 is a straight line through zero.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import log, nan
from pathlib import Path

import matplotlib.pyplot as plt
from bench_stream import build
from measured_process import measured

_CALLS = """
import warnings
import lightning.pytorch as pl, torch
from pathlib import Path
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
warnings.filterwarnings("ignore")
class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8))
    def validation_step(self, batch, index):
        self.log("loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
def prune(folder, method):
    prune_checkpoint(f"{folder}/base", f"{folder}/tuned", f"{folder}/{method}", PruningSpec(method, 0.99))
def apply(folder):
    apply_checkpoint(f"{folder}/base", f"{folder}/dare", f"{folder}/dense")
def draw(folder, seed):
    prune_checkpoint(f"{folder}/base", f"{folder}/tuned", f"{folder}/seed{seed}", PruningSpec("dare", 0.99, seed))
def merge(folder, method, count):
    deltas = [f"{folder}/seed{seed}" for seed in range(count)]
    merge_checkpoints(f"{folder}/base", deltas, f"{folder}/{method}{count}", method, 0.5, dtype="bfloat16",
                      tasks=[f"task{seed}" for seed in range(count)])
def sweep(folder, count):
    torch.manual_seed(0)
    module, data = Small(), torch.utils.data.TensorDataset(torch.randn(512, 64), torch.randint(0, 8, (512,)))
    base = {name: tensor + 0.01 for name, tensor in module.state_dict().items()}
    Path(folder).mkdir(exist_ok=True)
    torch.save(base, f"{folder}/base.pt")
    callback = DeltaPruneCallback("dare", 0.99, seeds=list(range(count)), monitor="loss", mode="min",
                                  pretrained=f"{folder}/base.pt", output_dir=f"{folder}/rows{count}")
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    pl.Trainer(accelerator="cpu", callbacks=[callback], **quiet).validate(
        module, torch.utils.data.DataLoader(data, batch_size=64), verbose=False)
"""
Line = dict[float, tuple[float, float]]  # CPU seconds and MiB by what is varied


def work(function: str, *arguments: object) -> tuple[float, float]:
    """CPU seconds and MiB."""
    found = measured(_CALLS, function, *arguments)
    return found.cpu, found.peak


def repeated(repeats: int, run: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
    """Median of seconds and of memory."""
    runs = [run(turn) for turn in range(repeats)]
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def over_size(folder: Path, billions: Sequence[float], repeats: int) -> dict[str, Line]:
    lines: dict[str, Line] = {name: {} for name in ("dare", "magnitude", "importance", "apply")}
    for size in billions:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            real = build(Path(place), size) / 1e9
            for name, line in lines.items():

                def run(turn: int, name: str = name, place: str = place) -> tuple[float, float]:
                    made = Path(place) / ("dense" if name == "apply" else name)
                    if made.exists():
                        made.rename(Path(place) / f"{made.name}-{turn}")
                    return work("apply", place) if name == "apply" else work("prune", place, name)

                line[real] = repeated(repeats, run)
                show(name, real, line[real])
    return lines


def over_deltas(folder: Path, size: float, deltas: Sequence[int], repeats: int) -> dict[str, Line]:
    lines: dict[str, Line] = {name: {} for name in ("task-arithmetic", "ties")}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        build(Path(place), size)
        for seed in range(max(deltas)):
            work("draw", place, seed)
        for name, line in lines.items():
            for count in deltas:
                line[count] = repeated(repeats, lambda turn: work("merge", place, name, count))  # noqa: B023
                show(name, count, line[count])
    return lines


def over_rows(folder: Path, rows: Sequence[int], repeats: int) -> dict[str, Line]:
    line: Line = {}
    for count in rows:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            line[count] = repeated(repeats, lambda turn: work("sweep", f"{place}/{turn}", count))  # noqa: B023
        show("rows", count, line[count])
    return {"rows of dare": line}


def show(name: str, x: float, measured: tuple[float, float]) -> None:
    print(f"{name} {x:g}: {measured[0]:.2f} CPU s, {measured[1]:.0f} MiB", file=sys.stderr, flush=True)


def exponent(line: Line, which: int) -> float:
    """Slope of the least-squares line through the logarithms; NaN of a single point."""
    if len(line) < 2:
        return nan
    xs, ys = [log(x) for x in line], [log(max(values[which], 1e-9)) for values in line.values()]
    slope, _ = statistics.linear_regression(xs, ys)
    return slope


def table(title: str, lines: dict[str, Line]) -> None:
    xs = list(next(iter(lines.values())))
    print(f"| {title} | {' | '.join(f'{x:.2g}' for x in xs)} | exponents |\n|{'---|' * (len(xs) + 2)}")
    for name, line in lines.items():
        cells = " | ".join(f"{seconds:.3g}; {peak:.0f}" for seconds, peak in line.values())
        print(f"| {name} | {cells} | {exponent(line, 0):.2f}; {exponent(line, 1):.2f} |")
    print()


def draw(figures: dict[str, dict[str, Line]], picture: Path) -> None:
    figure, axes = plt.subplots(2, len(figures), figsize=(11, 6), squeeze=False)
    for column, (title, lines) in enumerate(figures.items()):
        for row, label in enumerate(("CPU seconds", "MiB above idle")):
            for name, line in lines.items():
                axes[row][column].plot(list(line), [values[row] for values in line.values()], "o-", label=name)
            axes[row][column].set(xlabel=title, ylabel=label, ylim=(0, None), xlim=(0, None))
        axes[0][column].legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--billions", type=float, nargs="+", default=[0.02, 0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--deltas", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    figures = {
        "10⁹ parameters": over_size(options.folder, options.billions, options.repeats),
        "deltas merged": over_deltas(options.folder, min(options.billions), options.deltas, options.repeats),
        "rows of a sweep": over_rows(options.folder, options.rows, options.repeats),
    }
    for title, lines in figures.items():
        table(title, lines)
    if options.picture:
        draw(figures, options.picture)


if __name__ == "__main__":
    main()
