"""Time and memory of ``dpp merge`` on two deltas against mergekit on the dense exports of the same two. Run by hand.

    python tests/benchmarks/bench_merge_speed.py [--billions 0.1 0.3] [--rates 0.9 0.99] [--repeats 3] [--folder DIR]

Llama-shaped bfloat16 models. mergekit (``pip install --no-deps mergekit==0.1.5 immutables``) writes a dense model; ours
a delta folder, and in a second row a dense model too. Each run is a process of its own; memory is the peak of RssAnon
(private memory) above that of the interpreter with the libraries imported.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_stream import blocks, shapes
from measured_process import measured
from transformers import LlamaConfig

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter

_OURS = """
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.merging.merge_deltas import merge_checkpoints
def merge(base, deltas, output, method, weight, dense):
    merge_checkpoints(base, deltas, output, method, weight, tasks=["a", "b"], dtype="bfloat16")
    if dense:
        apply_checkpoint(base, output, dense)
"""
_PEERS = """
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, quiet=True, write_model_card=False)
def merge(config, output):
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), output, options)
"""
_MERGEKIT = {"task-arithmetic": "task_arithmetic", "ties": "ties"}


def build(folder: Path, billions: float) -> None:
    """A base and two models fine-tuned from it."""
    wanted = shapes(billions)
    width = wanted["model.norm.weight"][0]
    layers = sum(name.endswith("q_proj.weight") for name in wanted)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=wanted["model.layers.0.mlp.gate_proj.weight"][0],
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(0)
    noise, *steps = (scale * torch.randn(1 << 24, generator=generator) for scale in (0.02, 1e-3, 1e-3))
    entries = [Entry(name, torch.bfloat16, shape) for name, shape in wanted.items()]
    for side, step in (("base", None), ("a", steps[0]), ("b", steps[1])):
        (folder / side).mkdir(parents=True)
        config.save_pretrained(folder / side)
        with ShardedWriter(folder / side, entries) as writer:
            for shift, entry in enumerate(entries):
                for block in blocks(torch.Size(entry.shape).numel()):
                    own = noise.roll(shift)[:block]  # tensors that are alike would be taken for tied ones
                    writer.write((own if step is None else own + step.roll(shift)[:block]).bfloat16())


def mergekit_config(folder: Path, method: str, rate: float) -> str:
    """What a mergekit user writes for the same merge."""
    models = "".join(
        f"\n  - model: {folder / side}-dense\n    parameters: {{weight: 0.5, density: 1.0}}" for side in "ab"
    )
    extra = "\nparameters: {normalize: true}" if method == "ties" else ""
    return (
        f"merge_method: {_MERGEKIT[method]}\nbase_model: {folder / 'base'}\nmodels:{models}{extra}\ndtype: bfloat16\n"
    )


def measure(folder: Path, billions: float, rate: float, repeats: int) -> None:
    for side in "ab":
        for made in (folder / f"{side}-delta", folder / f"{side}-dense"):
            shutil.rmtree(made, ignore_errors=True)
        prune_checkpoint(folder / "base", folder / side, folder / f"{side}-delta", PruningSpec("dare", rate, ord(side)))
        apply_checkpoint(folder / "base", folder / f"{side}-delta", folder / f"{side}-dense")
    deltas = [folder / "a-delta", folder / "b-delta"]
    for method in _MERGEKIT:
        runs: dict[str, list] = {"dpp merge": [], "dpp merge --dense": []} | (
            {"mergekit": []} if find_spec("mergekit") else {}
        )
        for _ in range(repeats):
            for name, results in runs.items():
                for made in ("merged", "dense"):
                    shutil.rmtree(folder / made, ignore_errors=True)
                dense = folder / "dense" if name.endswith("--dense") else None
                if name == "mergekit":
                    results.append(measured(_PEERS, "merge", mergekit_config(folder, method, rate), folder / "dense"))
                else:
                    results.append(
                        measured(_OURS, "merge", folder / "base", deltas, folder / "merged", method, 0.5, dense)
                    )
        peer = statistics.median(r.wall for r in runs["mergekit"]) if "mergekit" in runs else float("nan")
        for name, results in runs.items():
            seconds = statistics.median(r.wall for r in results)
            print(
                f"| {billions} | {rate} | {method} | {name} | {seconds:.2f} | {seconds / peer:.2f} | "
                f"{max(r.peak for r in results):.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--billions", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.99])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| billion parameters | p | method | | seconds | over mergekit | peak RssAnon above idle, MiB |")
    print("|---|---|---|---|---|---|---|")
    for billions in arguments.billions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            build(Path(folder), billions)
            for rate in arguments.rates:
                measure(Path(folder), billions, rate, arguments.repeats)


if __name__ == "__main__":
    main()
