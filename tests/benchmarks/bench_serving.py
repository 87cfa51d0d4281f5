"""Many deltas of one base in one process: bytes, swaps, and batches of several deltas, against dense copies.

Run by hand: python tests/benchmarks/bench_serving.py BASE FINETUNED [FINETUNED ...] [--repeats N]. The folders are
sequence classifiers of transformers with as many labels each. Deltas are pruned in memory with seeds of their own. What
is compared takes turns, so that other load on the machine falls on all of it; the tables hold medians of the thread's
CPU time in ms.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from dpp_lightning import DeltaPool, SparseDelta, prune

TOKENS, MANY, FEW, RARE = 32, 100, 8, 4


def load(folder: str, labels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels).eval()


def in_turns(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median ms of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 2):
        for name, run in contenders.items():
            start = time.thread_time()
            run()
            if turn > 1:
                seconds[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make_deltas(base: torch.nn.Module, finetuned: list[torch.nn.Module]) -> dict[str, SparseDelta]:
    """MANY deltas at 0.99, the first FEW of them those that are timed, and RARE at 0.999."""
    deltas = {}
    for number in range(MANY + RARE):
        rate, name = (0.99, f"d{number}") if number < MANY else (0.999, f"r{number}")
        model = finetuned[number % len(finetuned)]
        deltas[name] = prune(base, model, "dare", rate, seed=number, carry=["classifier.*"])
    return deltas


def bytes_table(base: torch.nn.Module, deltas: dict[str, SparseDelta]) -> None:
    dense = sum(parameter.nbytes for parameter in base.parameters())
    print("| deltas | p | MB in the pool | of the base | growth of the process, MB | MB of dense copies |")
    print("|---|---|---|---|---|---|")
    for names in ([f"d{k}" for k in range(FEW)], [n for n in deltas if n[0] == "r"], [f"d{k}" for k in range(MANY)]):
        pool, before = DeltaPool(base, "100 GB"), resident()
        for name in names:
            pool.add(name, deltas[name])
        pool.preload()
        held, grown = pool.stats().num_bytes, resident() - before
        rate = deltas[names[0]].pruning_rate
        ratio = f"{held / 1e6:.1f} | {held / dense:.2f} | {grown / 1e6:.0f}"
        print(f"| {len(names)} | {rate:g} | {ratio} | {len(names) * dense / 1e6:,.0f} |")


def swaps_table(base: torch.nn.Module, pool: DeltaPool, deltas: dict[str, SparseDelta], repeats: int) -> None:
    one = torch.randint(1000, 20000, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def swap(name: str) -> Callable[[], None]:
        def run() -> None:
            with pool.use(name):
                pass

        return run

    def by_product(name: str) -> Callable[[], None]:
        def run() -> None:
            deltas[name].apply_(other)
            deltas[name].revert_(other)

        return run

    other, rare = copy.deepcopy(base), next(name for name in deltas if name[0] == "r")
    contenders = {"forward of one text": lambda: base(input_ids=one)}
    for name, rate in (("d0", 0.99), (rare, 0.999)):
        contenders[f"pool.use, p = {rate}"] = swap(name)
        contenders[f"apply_ and revert_, p = {rate}"] = by_product(name)
    medians = in_turns(contenders, repeats)
    print("\n| | ms | of the forward |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['forward of one text']:.2f} |")


def batches_table(base: torch.nn.Module, pool: DeltaPool, deltas: dict[str, SparseDelta], repeats: int) -> None:
    names = [f"d{k}" for k in range(FEW)]
    copies = [copy.deepcopy(base) for _ in names]
    for name, model in zip(names, copies, strict=True):
        deltas[name].apply_(model)
    print("\n| texts of each of 8 deltas | plain batch, ms | mixed | grouped | dense copies |\n|---|---|---|---|---|")
    for count in (1, 4, 16):
        ids = torch.randint(1000, 20000, (FEW * count, TOKENS), generator=torch.Generator().manual_seed(count))
        rows = [name for name in names for _ in range(count)]
        parts = list(zip(names, copies, ids.split(count), strict=True))

        def mixed(rows: list[str] = rows, ids: torch.Tensor = ids) -> torch.Tensor:
            with pool.mixed(rows):
                return base(input_ids=ids).logits

        def grouped(parts: list = parts) -> torch.Tensor:
            logits = []
            for name, _, own in parts:
                with pool.use(name):
                    logits.append(base(input_ids=own).logits)
            return torch.cat(logits)

        contenders = {
            "plain": lambda ids=ids: base(input_ids=ids),
            "mixed": mixed,
            "grouped": grouped,
            "dense": lambda parts=parts: [model(input_ids=own) for _, model, own in parts],
        }
        error = float((mixed() - grouped()).abs().max())
        ms = in_turns(contenders, max(repeats // count, 3))
        of_plain = " | ".join(
            f"{ms[name]:.0f} ({ms[name] / ms['plain']:.2f})" for name in ("mixed", "grouped", "dense")
        )
        print(f"| {count} | {ms['plain']:.0f} | {of_plain} |   (largest difference of a logit {error:.1e})")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("finetuned", nargs="+")
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    base = load(arguments.base, arguments.labels)
    deltas = make_deltas(base, [load(folder, arguments.labels) for folder in arguments.finetuned])
    bytes_table(base, deltas)
    pool = DeltaPool(base, "100 GB")
    for name, delta in deltas.items():
        pool.add(name, delta)
    swaps_table(base, pool, deltas, arguments.repeats)
    batches_table(base, pool, deltas, arguments.repeats)


if __name__ == "__main__":
    main()
