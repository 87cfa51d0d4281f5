"""Time and memory of dpp prune and dpp apply on synthetic Llama-shaped bfloat16 pairs of growing size. Run by hand.

python tests/benchmarks/bench_stream.py [--billions 0.1 0.3 1 3] [--rate 0.99] [--folder DIR]

Every size needs about 8 bytes of disk a parameter while it runs; everything is deleted after. The peers in the same run
are reading both models' files once and, for dpp apply, writing and syncing as many bytes as it writes. Memory is the peak
of RssAnon (private memory; pages mapped from files are apart) above that of the interpreter with the library imported,
sampled every 5 ms in a process of its own.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measured_process import measured

from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter

_CALLS = """
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
def prune(base, finetuned, output, method, rate):
    prune_checkpoint(base, finetuned, output, PruningSpec(method, rate))
"""


def shapes(billions: float, vocabulary: int = 32000) -> dict[str, tuple[int, ...]]:
    """A Llama of about that many parameters: width a multiple of 128, ffn 2.75 times, as many layers as fit."""
    width = {0.02: 256, 0.1: 640, 0.3: 1024, 1.0: 2048, 3.0: 3072}.get(billions, 4096)
    ffn = width * 11 // 4
    layer = {f"self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (ffn, width), "mlp.up_proj.weight": (ffn, width)}
    layer |= {"mlp.down_proj.weight": (width, ffn)}
    layer |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    ends = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    room = billions * 1e9 - 2 * vocabulary * width
    layers = max(1, -(-int(room) // sum(torch.Size(s).numel() for s in layer.values())))
    inside = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {**ends, **inside, "model.norm.weight": (width,)}


def build(folder: Path, billions: float) -> int:
    """Write base and fine-tuned model; returns the number of parameters."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(1 << 24, generator=generator)
    step = 1e-3 * torch.randn(1 << 24, generator=generator)
    entries = [Entry(name, torch.bfloat16, shape) for name, shape in shapes(billions).items()]
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
        (folder / side / "config.json").write_text("{}")
        with ShardedWriter(folder / side, entries) as writer:
            for shift, entry in enumerate(entries):
                own = noise.roll(shift)  # two tensors that begin alike are compared, and may be tied
                for block in blocks(torch.Size(entry.shape).numel()):
                    values = own[:block] if side == "base" else own[:block] + step.roll(shift)[:block]
                    writer.write(values.bfloat16())
    os.sync()
    return sum(torch.Size(entry.shape).numel() for entry in entries)


def blocks(numel: int) -> Iterator[int]:
    while numel > 0:
        yield min(numel, 1 << 24)
        numel -= 1 << 24


def weights(folder: Path) -> list[Path]:
    return [path for side in ("base", "tuned") for path in sorted((folder / side).glob("*.safetensors"))]


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in weights(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    start = time.perf_counter()
    buffer = bytearray(1 << 23)
    for path in weights(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def write(folder: Path) -> float:
    """As many bytes as the base's files have, and synced."""
    size, piece = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors")), bytes(1 << 23)
    start = time.perf_counter()
    with (folder / "written").open("wb", buffering=0) as file:
        for first in range(0, size, len(piece)):
            file.write(piece[: size - first])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (folder / "written").unlink()
    return seconds


def measure(folder: Path, parameters: int, rate: float, repeats: int, *, cold: bool) -> None:
    methods = ("dare",) if cold else ("dare", "magnitude", "importance")
    reads, runs = [], {name: [] for name in methods}
    for _ in range(repeats):
        if cold:
            forget(folder)
        reads.append(read(folder))
        for method in methods:
            if cold:
                forget(folder)
            shutil.rmtree(folder / method, ignore_errors=True)
            runs[method].append(
                measured(_CALLS, "prune", folder / "base", folder / "tuned", folder / method, method, rate)
            )
    reading, start = statistics.median(reads), f"| {parameters / 1e9:.2f} | {'cold' if cold else 'warm'} |"
    print(f"{start} reading both once | {reading:.2f} | 1 | | |", flush=True)
    for method, results in runs.items():
        seconds = statistics.median(r.wall for r in results)
        size = sum(f.stat().st_size for f in (folder / method).glob("delta_*"))
        peak = max(r.peak for r in results)
        print(
            f"{start} prune, {method} | {seconds:.2f} | {seconds / reading:.2f} | {peak:.0f} | {size / 1e6:.1f} |",
            flush=True,
        )
    if not cold:
        apply(folder, start, repeats)


def apply(folder: Path, start: str, repeats: int) -> None:
    """The delta by ``dare``, against writing as many bytes."""
    writes, runs = [], []
    for _ in range(repeats):
        writes.append(write(folder))
        runs.append(measured(_CALLS, "apply_checkpoint", folder / "base", folder / "dare", folder / "dense"))
        shutil.rmtree(folder / "dense")
    writing, seconds = statistics.median(writes), statistics.median(r.wall for r in runs)
    print(f"{start} writing the output once | {writing:.2f} | | | |")
    peak = max(r.peak for r in runs)
    print(f"{start} apply, dare | {seconds:.2f} | {seconds / writing:.2f} of writing | {peak:.0f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--billions", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--rate", type=float, default=0.99)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cold", action="store_true", help="also with the files dropped from the page cache")
    arguments = parser.parse_args()
    print(f"p = {arguments.rate}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| billion parameters | page cache | | seconds | of reading | peak RssAnon above idle, MiB | delta, MB |")
    print("|---|---|---|---|---|---|---|")
    for billions in arguments.billions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            parameters = build(Path(folder), billions)
            for cold in (False, True)[: 1 + arguments.cold]:
                measure(Path(folder), parameters, arguments.rate, arguments.repeats, cold=cold)


if __name__ == "__main__":
    main()
