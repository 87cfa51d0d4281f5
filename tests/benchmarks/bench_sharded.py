"""What AdamR's reduction costs of a training step, and what gathering costs of drawing a delta, on several ranks.

Run by hand: python tests/benchmarks/bench_sharded.py [--worlds 1,2,4]. Ranks are processes of this
machine over gloo, each with one thread; with more ranks than cores they wait for one another, so that shares say more
than seconds. The model is a BERT of 22.7 M parameters, random, in shards by its blocks (FSDP2), or whole (DDP); all
ranks together take 16 samples of 32 tokens. Times are the first rank's medians; all ranks meet before each part that is
timed, so that no part pays for another.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning import prune
from dpp_lightning.optim import AdamR
from dpp_lightning.tensors.shards import shard_like

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import distjobs

SAMPLES, TOKENS, WARM_UP, STEPS = 16, 32, 3, 15
SIZE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
OPTIMIZERS = {"AdamR": lambda p: AdamR(p, lr=1e-4), "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)}
METHODS = ("dare", "importance", "magnitude")


def make(kind):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE))
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Clock:
    """Seconds spent in functions, which are wrapped while the clock is used."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrapped(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


@contextmanager
def collectives():
    """Time in reductions and in gathering whole tensors."""
    clock, reduce, gather = Clock(), dist.all_reduce, DTensor.full_tensor
    dist.all_reduce, DTensor.full_tensor = clock.wrapped(reduce), clock.wrapped(gather)
    try:
        yield clock
    finally:
        dist.all_reduce, DTensor.full_tensor = reduce, gather


def seconds_together(act: Callable) -> float:
    """Seconds of something that all ranks begin together."""
    dist.barrier()
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def step_cost(kind, optimizer):
    """Medians of a step's seconds: forward and backward, the optimizer, and the collectives in it."""
    model, rank, world = make(kind), dist.get_rank(), dist.get_world_size()
    optim = OPTIMIZERS[optimizer](model.parameters())
    tokens = torch.randint(0, 30000, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1)).chunk(world)[rank]
    labels = torch.zeros(len(tokens), dtype=torch.long)
    rows = []
    for _ in range(WARM_UP + STEPS):
        model.zero_grad()
        learn = seconds_together(lambda: model(input_ids=tokens, labels=labels).loss.backward())
        with collectives() as clock:
            step = seconds_together(optim.step)
        rows.append((learn, step, clock.seconds))
    return [median(column) for column in zip(*rows[WARM_UP:], strict=True)]


def prune_cost(kind, method):
    """Seconds of drawing a delta, of the collectives in it, and of putting it onto the base."""
    base, finetuned = make(kind), make(kind)
    with torch.no_grad():
        for p in finetuned.parameters():
            p.add_(shard_like(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), p))
    rows = []
    for _ in range(3):
        drawn = []
        with collectives() as clock:
            draw = seconds_together(lambda drawn=drawn: drawn.append(prune(base, finetuned, method, 0.99)))
        apply = seconds_together(lambda drawn=drawn: drawn[0].apply_(base))
        drawn[0].revert_(base)
        rows.append((draw, clock.seconds, apply))
    return [median(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default="1,2,4")
    worlds = [int(world) for world in parser.parse_args().worlds.split(",")]
    print(
        "| ranks | | forward and backward, ms | AdamR's step, ms | its reduction, ms (share of the whole step) | AdamW's step, ms |"
    )
    print("|---|---|---|---|---|---|")
    for world in worlds:
        for kind in ("ddp", "fsdp2"):
            learn, step, reduction = distjobs.run(step_cost, world, kind, "AdamR")[0]
            other = distjobs.run(step_cost, world, kind, "AdamW")[0][1]
            share = reduction / (learn + step)
            times = (learn * 1e3, step * 1e3, reduction * 1e3)
            print(
                "| {} | {} | {:.0f} | {:.1f} | {:.2f} ({:.2%}) | {:.1f} |".format(
                    world, kind, *times, share, other * 1e3
                )
            )
    print(
        "\n| ranks | method, p = 0.99 | drawing, s | collectives in it, s | putting it on, s |\n|---|---|---|---|---|"
    )
    for world in worlds:
        for method in METHODS:
            print(
                "| {} | {} | {:.2f} | {:.2f} | {:.3f} |".format(
                    world, method, *distjobs.run(prune_cost, world, "fsdp2", method)[0]
                )
            )


if __name__ == "__main__":
    main()
