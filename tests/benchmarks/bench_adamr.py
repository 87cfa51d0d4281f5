"""Time of one optimizer step on the parameters of a 12-layer encoder of width 384 (33 million), on this CPU.

Run by hand: python tests/benchmarks/bench_adamr.py [--repeats N]. All optimizers take turns, so that other load on the
machine falls on all of them; the table holds medians.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dpp_lightning.optim import AdamR

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from adamr_twin import AdamRTwin

VOCABULARY, WIDTH, INNER, LAYERS = 30522, 384, 1536, 12


def encoder_shapes() -> list[tuple[int, ...]]:
    """Shapes of all parameters: embeddings, and per layer four projections, two norms and the two inner linears."""
    layer = [(WIDTH, WIDTH), (WIDTH,)] * 4 + [(WIDTH,)] * 4 + [(INNER, WIDTH), (INNER,), (WIDTH, INNER), (WIDTH,)]
    return [(VOCABULARY, WIDTH), (512, WIDTH), (2, WIDTH), (WIDTH,), (WIDTH,)] + layer * LAYERS


def encoder_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in encoder_shapes()]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return parameters


def contenders() -> dict[str, Callable[[list], object]]:
    return {
        "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "AdamR-L2 (default)": lambda p: AdamR(p),
        "AdamR-L1 (default)": lambda p: AdamR(p, norm="l1"),
        "AdamR-L2, compiled": lambda p: AdamR(p, compiled=True),
        "AdamR-L1, compiled": lambda p: AdamR(p, norm="l1", compiled=True),
        "AdamR-L2, θ0 in bfloat16": lambda p: AdamR(p, pretrained_dtype="bfloat16"),
        "AdamR-L1, θ0 in bfloat16": lambda p: AdamR(p, norm="l1", pretrained_dtype="bfloat16"),
        "AdamR-L2, amsgrad": lambda p: AdamR(p, amsgrad=True),
        "AdamR-L2, single tensor": lambda p: AdamR(p, foreach=False),
        "released algorithm (plain twin)": lambda p: AdamRTwin([{"params": p}]),
    }


def measure(repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds per step, one list a contender; all work in turn on one set of parameters."""
    parameters = encoder_parameters()
    optimizers = {name: make(parameters) for name, make in contenders().items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(repeats + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn:  # the first turn allocates state
                seconds[name].append(time.perf_counter() - start)
    return seconds, sum(p.numel() for p in parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    seconds, entries = measure(parser.parse_args().repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fused, ours = medians["AdamW, fused"], medians["AdamR-L2 (default)"]
    print(f"{entries / 1e6:.1f} million parameters in {len(encoder_shapes())} tensors, torch {torch.__version__},")
    print(f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| optimizer | ns per parameter | over AdamW fused | over AdamR-L2 |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median / entries * 1e9:.2f} | {median / fused:.2f} | {median / ours:.2f} |")


if __name__ == "__main__":
    main()
