"""Time to prune a delta in memory against dense random masks, on the shapes of BERT-base. Run by hand.

python tests/benchmarks/bench_prune.py [--rate 0.99] [--repeats 5]
"""

import argparse
import os
import statistics
import time

import torch

from dpp_lightning.pruning import PruningPlan
from dpp_lightning.scope import Scope


def weights(seed: int) -> dict[str, torch.Tensor]:
    """BERT-base's 109 M entries, names and shapes as in its file."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embeddings.word_embeddings.weight": (30522, 768), "embeddings.position_embeddings.weight": (512, 768)}
    for i in range(12):
        block = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{block}{name}.weight": (768, 768), f"{block}{name}.bias": (768,)}
        shapes |= {f"{block}intermediate.dense.weight": (3072, 768), f"{block}intermediate.dense.bias": (3072,)}
        shapes |= {f"{block}output.dense.weight": (768, 3072), f"{block}output.dense.bias": (768,)}
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def dense_masks(base: dict, finetuned: dict, rate: float) -> dict:
    """As the published code of DARE: a dense delta, a dense Bernoulli mask, a dense product."""
    pruned = {}
    for name, tensor in base.items():
        delta = finetuned[name] - tensor
        mask = torch.bernoulli(torch.full_like(delta, rate))
        pruned[name] = tensor + (delta * (1 - mask)) / (1 - rate)
    return pruned


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=0.99)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    base, finetuned = weights(0), weights(1)
    plan = PruningPlan.of(base, finetuned, Scope())
    ways = {
        "dense masks (published way)": lambda seed: dense_masks(base, finetuned, arguments.rate),
        "PruningPlan.draw": lambda seed: plan.draw("dare", arguments.rate, seed),
        "draw and apply_": lambda seed: plan.draw("dare", arguments.rate, seed).apply_(dict(base), force=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(arguments.repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(seed)
            if seed:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    entries = sum(t.numel() for t in base.values())
    print(
        f"{entries / 1e6:.0f} M entries, p = {arguments.rate}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}\n"
    )
    print("| way | ms, median | times the first |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
