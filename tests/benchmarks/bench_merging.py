"""What merging does to scores: methods x rates x sets of GLUE tasks x ways to merge, as shares of the single models' own.

    python tests/benchmarks/bench_merging.py --base ENCODER --data GLUE --output rows.jsonl sst2=A.ckpt mrpc=B.ckpt ...

Every checkpoint is of ``dpp fit`` on that task with one base. The first two, three and four tasks are merged. Weights
are chosen for each number of tasks and way to merge on the calibration splits (DARE at the first rate, seed 0) and then
used for all, or given by ``--weights``; scores are of GLUE's validation splits. The deltas of a merge have masks of their
own, task k of n by seed n * s + k, or with ``--masks shared`` all the same one, by seed s. Deltas that need calibration are taken from ``--deltas
DIR/TASK/METHOD-pRATE-seedSEED`` (``dpp sweep`` writes such folders), the others are pruned here. Rows that the output
has are not made again.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from dpp_lightning import SparseDelta, merge, prune
from dpp_lightning.tasks.glue.data import GLUEDataModule
from dpp_lightning.tasks.glue.scores import GLUEScores
from dpp_lightning.tasks.glue.task_table import TASKS

GRID = {"task-arithmetic": (0.2, 0.3, 0.4, 0.6, 0.8, 1.0), "ties": (0.6, 0.8, 1.0, 1.3, 1.6, 2.0)}
SEEDLESS = ("magnitude", "dppa", "lowrank")


class Bench:
    """Base, data and fine-tuned models of all tasks."""

    def __init__(self, options) -> None:
        from dpp_lightning.tasks.glue.module import GLUEModule

        self.options = options
        self.tasks = dict(word.split("=", 1) for word in options.checkpoints)
        self.modules, self.data = {}, {}
        for task in self.tasks:
            self.modules[task] = GLUEModule(task, options.base, optimizer=torch.optim.SGD).eval()
            self.data[task] = GLUEDataModule(task, options.data, tokenizer=options.base)
            self.data[task].setup()
        self.base = {n: t.clone() for n, t in self.modules[next(iter(self.tasks))].state_dict().items()}
        self.deltas: dict[tuple, SparseDelta] = {}

    @torch.no_grad()
    def score(self, task, delta, split) -> float:
        """A task's score with a delta on the base."""
        module, scores = self.modules[task], GLUEScores(TASKS[task])
        loader = self.data[task].test_dataloader() if split == "test" else self.data[task].calibration_dataloader()
        with delta.applied(module):
            for batch in loader:
                scores.update(module(batch), batch["labels"])
        return float(scores.compute()["score"])

    def delta(self, task, method, rate, seed) -> SparseDelta:
        """The delta of one task, made or read once."""
        key = (task, method, rate, seed)
        if key not in self.deltas:
            seed = 0 if method in SEEDLESS else seed
            folder = Path(self.options.deltas) / task / f"{method}-p{rate:g}-seed{seed}"
            if folder.is_dir():
                made = SparseDelta.from_pretrained(folder)
            else:
                q = {"q": 1 - rate} if method in ("importance", "darex-q") else {}
                made = prune(self.options.base, self.tasks[task], method, rate, seed, **q)
            self.deltas[key] = made
        return self.deltas[key]

    def merged(self, tasks, method, rate, seed, way, weight, masks="own") -> SparseDelta:
        """Task arithmetic with that weight, or TIES scaled by it."""
        seeds = {t: seed if masks == "shared" else seed * len(tasks) + k for k, t in enumerate(tasks)}
        deltas = {task: self.delta(task, method, rate, seeds[task]) for task in tasks}
        settings = {"weights": weight} if way == "task-arithmetic" else {"scale": weight}
        return merge(self.options.base, deltas, way, **settings)

    def choose(self, tasks, way, singles) -> tuple[float, dict]:
        """The weight with the best mean share on the calibration splits."""
        shares = {}
        for weight in GRID[way]:
            delta = self.merged(tasks, "dare", self.options.rates[0], 0, way, weight)
            shares[weight] = fmean(
                self.score(t, delta.for_task(t), "calibration") / singles["calibration"][t] for t in tasks
            )
        return max(shares, key=lambda w: shares[w]), shares


def run(options) -> None:
    bench, output = Bench(options), Path(options.output)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []

    def tell(**row) -> dict:
        rows.append(row)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
        return row

    known = {
        json.dumps([r[k] for k in r if k in ("kind", "tasks", "method", "rate", "seed", "way", "masks")]): r
        for r in rows
    }

    def once(make, **key) -> dict:
        return known.get(json.dumps(list(key.values()))) or tell(**key, **make())

    everything = list(bench.tasks)
    singles = once(lambda: {
        split: {t: bench.score(t, prune(options.base, bench.tasks[t], "magnitude", 0.0), split) for t in everything}
        for split in ("test", "calibration")
    }, kind="single")  # fmt: skip
    for number in options.numbers:
        tasks = everything[:number]
        for way in options.ways:
            given = dict(word.split("=") for word in options.weights)
            chosen = {"weight": float(given[way])} if way in given else once(
                lambda t=tasks, w=way: dict(zip(("weight", "tried"), bench.choose(t, w, singles), strict=True)),
                kind="weight", tasks=tasks, way=way,
            )  # fmt: skip
            for rate in options.rates:
                for method in options.methods:
                    seeds = [0] if method in SEEDLESS else options.seeds
                    for masks, seed in product(options.masks[:1] if method in SEEDLESS else options.masks, seeds):

                        def made(t=tasks, m=method, r=rate, s=seed, w=way, weight=chosen["weight"], masks=masks):
                            start = time.perf_counter()
                            delta = bench.merged(t, m, r, s, w, weight, masks)
                            seconds = time.perf_counter() - start
                            scores = {task: bench.score(task, delta.for_task(task), "test") for task in t}
                            ratios = {task: scores[task] / singles["test"][task] for task in t}
                            return {"scores": scores, "ratios": ratios, "ratio": fmean(ratios.values()),
                                    "seconds": seconds, "kept": delta.num_kept}  # fmt: skip

                        once(made, kind="merge", tasks=tasks, way=way, rate=rate, method=method, seed=seed, masks=masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="TASK=CKPT")
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--deltas", default="nowhere")
    parser.add_argument("--output", required=True)
    parser.add_argument("--methods", nargs="+", default=["magnitude", "dare", "darex-q", "dppa", "importance"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.9, 0.8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--numbers", nargs="+", type=int, default=[4, 2, 3])
    parser.add_argument("--masks", nargs="+", choices=["own", "shared"], default=["own"])
    parser.add_argument("--weights", nargs="+", default=[], metavar="WAY=NUMBER")
    parser.add_argument("--ways", nargs="+", default=["task-arithmetic", "ties"])
    run(parser.parse_args())


if __name__ == "__main__":
    main()
