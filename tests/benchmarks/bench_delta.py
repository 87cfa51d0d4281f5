"""Size and speed of delta files on the shapes of BERT-base (109.5 M parameters, all pruned). Run by hand.

python tests/benchmarks/bench_delta.py [--repeats 7]

Peers in the same run: mergekit's ``bernoulli`` on the dense delta (``pip install --no-deps mergekit``; left out if it is
not there), the published way (a dense mask), and loading a dense fine-tuned file with safetensors.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpp_lightning import SparseDelta
from dpp_lightning.analysis.delta_cost import inspect_delta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope


def shapes() -> dict[str, tuple[int, ...]]:
    """BERT-base's 199 tensors, names and shapes as in its file."""
    width, inner = 768, 3072
    wanted: dict[str, tuple[int, ...]] = {}
    for name, rows in (("word", 30522), ("position", 512), ("token_type", 2)):
        wanted[f"embeddings.{name}_embeddings.weight"] = (rows, width)
    maps = {f"attention.self.{n}": (width, width) for n in ("query", "key", "value")}
    maps |= {"attention.output.dense": (width, width), "intermediate.dense": (inner, width)}
    maps |= {"output.dense": (width, inner)}
    norms = ["embeddings.LayerNorm"]
    for i in range(12):
        block = f"encoder.layer.{i}."
        wanted |= {f"{block}{name}.weight": shape for name, shape in maps.items()}
        wanted |= {f"{block}{name}.bias": shape[:1] for name, shape in maps.items()}
        norms += [f"{block}attention.output.LayerNorm", f"{block}output.LayerNorm"]
    wanted |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    return wanted | {"pooler.dense.weight": (width, width), "pooler.dense.bias": (width,)}


def weights(generator: torch.Generator, scale: float) -> dict[str, torch.Tensor]:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes().items()}


def compare(ways: dict[str, Callable[[], object]], repeats: int) -> None:
    """Medians of interleaved runs, and each as a multiple of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    print("| | ms, median | of the first |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} | {median / first:.3f} |")
    print()


def dense_mask(base: dict, finetuned: dict, rate: float) -> dict:
    """As the published code of DARE: a dense delta, a dense Bernoulli mask, a dense product."""
    pruned = {}
    for name, tensor in base.items():
        delta = finetuned[name] - tensor
        mask = torch.bernoulli(torch.full_like(delta, rate))
        pruned[name] = tensor + (delta * (1 - mask)) / (1 - rate)
    return pruned


def sizes(plan: PruningPlan, folder: Path) -> None:
    print(
        "| method | p | dtype | MB | positions, bytes | over their entropy | values, bits each | encode, M/s | decode, M/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [("dare", 0.9, "bfloat16"), ("dare", 0.99, "bfloat16"), ("dare", 0.999, "bfloat16")]
    cases += [("dare", 0.99, d) for d in ("float32", "float16", "int8", "int4", "int3", "int2")]
    cases += [("dare", rate, "int2") for rate in (0.9, 0.999)]
    cases += [("magnitude", p, "bfloat16") for p in (0.9, 0.99, 0.999)]
    cases += [("importance", p, "bfloat16") for p in (0.99, 0.999)]
    for method, rate, dtype in cases:
        delta = plan.draw(PruningSpec(method, rate, 0, dtype))
        start = time.perf_counter()
        delta.save_pretrained(folder / "d")
        middle = time.perf_counter()
        SparseDelta.from_pretrained(folder / "d")
        seconds = (middle - start, time.perf_counter() - middle)
        cost = inspect_delta(folder / "d")
        speed = [f"{delta.num_kept / s / 1e6:.0f}" for s in seconds]
        over = f"{100 * cost.above_entropy:+.2f} %" if cost.entropy else "seed"
        row = (method, rate, dtype, f"{cost.total / 1e6:.3f}", f"{cost.positions:,}", over)
        print("|", " | ".join(map(str, (*row, f"{8 * cost.values / delta.num_kept:.2f}", *speed))), "|")
    print()


def bernoullis(deltas: dict, rate: float) -> list:
    from mergekit.sparsify import bernoulli

    return [bernoulli(delta, 1 - rate) for delta in deltas.values()]


def pruning(plan: PruningPlan, rate: float, repeats: int) -> None:
    print(f"## prune in memory, p = {rate}\n")
    ways: dict[str, Callable[[], object]] = {}
    if find_spec("mergekit"):
        dense = {name: plan.finetuned[name] - tensor for name, tensor in plan.base.items()}
        ways["mergekit bernoulli on the ready delta"] = partial(bernoullis, dense, rate)
    ways["dense mask, as published"] = partial(dense_mask, plan.base, plan.finetuned, rate)
    ways["PruningPlan.draw"] = partial(plan.draw, PruningSpec("dare", rate, 1))
    compare(ways, repeats)


def loading(plan: PruningPlan, rate: float, folder: Path, repeats: int) -> None:
    """Into a model in memory, from files in the page cache; the base is put back between two runs."""
    for seed in (0, 1):
        plan.draw(PruningSpec("dare", rate, seed, "bfloat16")).save_pretrained(folder / f"d{seed}")
    model = torch.nn.ParameterDict({n.replace(".", "/"): torch.nn.Parameter(t.clone()) for n, t in plan.base.items()})
    state = {name: model[name.replace(".", "/")] for name in plan.base}

    def load_dense() -> None:
        loaded = load_file(folder / "dense.safetensors")
        model.load_state_dict({name.replace(".", "/"): tensor for name, tensor in loaded.items()})

    def restore() -> None:
        for name, tensor in state.items():
            tensor.data.copy_(plan.base[name])

    def load_delta() -> None:
        SparseDelta.from_pretrained(folder / "d0").apply_(state)

    def swap() -> None:
        deltas[0].revert_(state)
        deltas[1].apply_(state)
        deltas.reverse()

    print(f"## load and apply to a model in memory, warm cache, p = {rate}\n")
    ways = {"load_state_dict(load_file(dense))": load_dense, "(restore the base)": restore}
    compare({**ways, "from_pretrained and apply_": load_delta, "(restore it again)": restore}, repeats)
    size = inspect_delta(folder / "d0").total / (folder / "dense.safetensors").stat().st_size
    print(f"bytes read: {size:.4f} of the dense file\n")
    deltas = [SparseDelta.from_pretrained(folder / f"d{seed}") for seed in (0, 1)]
    deltas[0].apply_(state)
    print(f"## swap one delta for another, p = {rate}\n")
    compare({"revert_ and apply_": swap}, repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    generator = torch.Generator().manual_seed(0)
    base = weights(generator, 0.02)
    finetuned = {name: base[name] + d for name, d in weights(generator, 1e-3).items()}
    plan = PruningPlan.of(base, finetuned, Scope())
    start = time.perf_counter()
    plan.fingerprint  # noqa: B018 - the hash of the base is taken once for a plan, and timed apart
    entries, hashing = sum(prod(shape) for shape in shapes().values()), time.perf_counter() - start
    machine = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    print(
        f"{entries / 1e6:.1f} M entries in {len(base)} tensors, {machine}; hash of the base {1000 * hashing:.0f} ms\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes(plan, folder)
        save_file(finetuned, folder / "dense.safetensors")
        for rate in (0.99, 0.999):
            pruning(plan, rate, repeats)
            loading(plan, rate, folder, repeats)


if __name__ == "__main__":
    main()
