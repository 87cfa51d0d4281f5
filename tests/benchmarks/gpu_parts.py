"""The parts of gpu_check.py, which starts each as a process: python gpu_parts.py PART --rows FILE --device cuda.

A part yields rows as soon as it has them: the case, what came out, seconds, and the peak of memory in MiB, on a GPU that
of torch's allocator, on a CPU that of the whole process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[2]
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
RATE = 0.99


class Device:
    """Where a part runs, at which size; it measures seconds and memory there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name, self.small = options.device, options.small
        self.pretrained, self.data = options.pretrained, options.data

    def size(self, full: int, small: int) -> int:
        return small if self.small else full

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - start

    def forget_peak(self) -> None:
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def row(self, case: str, result: object = "", seconds: float | None = None) -> dict:
        return {"case": case, "result": str(result), "seconds": seconds, "peak_mib": self.peak_mib()}


def tests(device: Device) -> Iterator[dict]:
    """``pytest -m gpu``; on a CPU the same tests' cases for a CPU, which run by default."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    which = ["-m", "gpu"] if device.name == "cuda" else ["-k", "cpu"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *which, *map(str, files)]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:] or "no output"]
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:10]:
        yield device.row("a test failed", line[:200])
    yield {"case": f"pytest {' '.join(which)}", "result": lines[-1].strip("= "), "seconds": time.perf_counter() - start}
    if done.returncode:
        raise SystemExit(f"pytest ended with exit code {done.returncode}")


def groups() -> list[dict[str, Callable[[list], torch.optim.Optimizer]]]:
    """Optimizers whose steps take turns; ratios are those over the first of the group."""
    from dpp_lightning.optim import AdamR

    fused = {"AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True)}
    ours = {"AdamR-L2": {}, "AdamR-L1": {"norm": "l1"}}
    eager = {name: lambda p, s=settings: AdamR(p, **s) for name, settings in ours.items()}
    compiled = {f"{name}, compiled": lambda p, s=s: AdamR(p, compiled=True, **s) for name, s in ours.items()}
    captured = {f"{name}, in a CUDA graph": lambda p, s=s: AdamR(p, capturable=True, **s) for name, s in ours.items()}
    single = {"AdamR-L2, one tensor at a time": lambda p: AdamR(p, foreach=False)}
    amsgrad = {"AdamW, fused, amsgrad": lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True)}
    amsgrad_ours = {"AdamR-L2, amsgrad": lambda p: AdamR(p, amsgrad=True)}
    captured = captured if torch.cuda.is_available() else {}
    return [fused | eager | single | captured, fused | compiled, amsgrad | amsgrad_ours]


def step_of(name: str, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """A step; replayed where the optimizer's name says that a CUDA graph is to hold it."""
    if "CUDA graph" not in name:
        return optimizer.step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def bert_shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    inner = 4 * width
    layer = [(width, width), (width,)] * 4 + [(width,)] * 4 + [(inner, width), (inner,), (width, inner), (width,)]
    return [(vocabulary, width), (512, width), (2, width), (width,), (width,)] + layer * layers


def adamr(device: Device) -> Iterator[dict]:
    """A step of AdamR over one of torch's fused AdamW, in turns, on BERT-base's shapes."""
    failed: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        for group in groups():
            yield from steps_in_turn(
                device, parameters(device, dtype), group, str(dtype).removeprefix("torch."), failed
            )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def parameters(device: Device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    shapes = bert_shapes(device.size(768, 64), device.size(12, 2), device.size(30522, 2000))
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        drawn = torch.randn(shape, generator=generator)
        made.append(torch.nn.Parameter((0.02 * drawn).to(device.name, dtype)))
        made[-1].grad = (1e-3 * drawn).to(device.name, dtype)
    return made


def steps_in_turn(device: Device, params: list, group: dict, dtype: str, failed: list[str]) -> Iterator[dict]:
    steps: dict[str, Callable[[], object]] = {}
    peaks, first, entries = {}, {}, sum(p.numel() for p in params)
    for name, make in group.items():
        try:
            optimizer = make(params)
            steps[name] = step_of(name, optimizer)
            first[name] = device.seconds(steps[name])
            device.forget_peak()
            held = torch.cuda.memory_allocated() / 2**20 if device.name == "cuda" else 0.0
            device.seconds(steps[name])
            peaks[name] = device.peak_mib() - held  # on a GPU beside what parameters and states take
        except Exception as error:
            steps.pop(name, None)
            failed.append(f"{dtype}, {name}")
            yield device.row(failed[-1], f"{type(error).__name__}: {str(error).strip()[:200]}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(device.size(20, 3)):
        for name, step in steps.items():
            times[name].append(device.seconds(step))
    fused = next(iter(group))
    for name, seconds in times.items():
        middle = median(seconds)
        ratio = f", {middle / median(times[fused]):.2f} of the fused" if fused in times and name != fused else ""
        late = f", first step {first[name]:.1f} s" if "compiled" in name else ""
        result = f"{middle / entries * 1e9:.3f} ns a parameter{ratio}{late}"
        yield {"case": f"{dtype}, {name}", "result": result, "seconds": middle, "peak_mib": peaks[name]}


def delta(device: Device) -> Iterator[dict]:
    """Draw, apply, take off and swap deltas of a model of 10⁹ parameters in bfloat16, at rate 0.99."""
    from dpp_lightning.methods.pruning_spec import PruningSpec
    from dpp_lightning.pruning.plan import PruningPlan
    from dpp_lightning.pruning.scope import Scope

    count, side = device.size(60, 4), device.size(4096, 256)
    base, finetuned = (torch.nn.Module() for _ in range(2))
    torch.manual_seed(0)
    for i in range(count):
        theta = 0.02 * torch.randn(side, side, device=device.name)
        change = 1e-3 * torch.randn(side, side, device=device.name)
        base.register_parameter(f"w{i}", torch.nn.Parameter(theta.bfloat16()))
        finetuned.register_parameter(f"w{i}", torch.nn.Parameter((theta + change).bfloat16()))
    original = [p.detach().clone() for p in base.parameters()]
    plan = PruningPlan.of(base, finetuned, Scope())
    yield device.row("two models, and a copy of the base", f"{count * side * side / 1e6:,.0f} million parameters each")
    for method in ("dare", "importance", "magnitude"):
        device.forget_peak()
        drawn = []
        seconds = device.seconds(lambda drawn=drawn, method=method: drawn.append(plan.draw(PruningSpec(method, RATE))))
        kept = sum(part.indices.numel() for part in drawn[0].tensors.values())
        yield device.row(f"{method}: draw", f"{kept:,} kept", seconds)
        if method == "dare":
            other = plan.draw(PruningSpec(method, RATE, 1))
            yield from applied(device, base, drawn[0], other, original)


def applied(device: Device, base, one, other, original) -> Iterator[dict]:
    device.forget_peak()
    yield device.row("apply (first)", "", device.seconds(lambda: one.apply_(base)))
    yield device.row("revert", "", device.seconds(lambda: one.revert_(base)))
    yield device.row("apply (again)", "", device.seconds(lambda: one.apply_(base)))

    def swap() -> None:
        one.revert_(base)
        other.apply_(base)

    yield device.row("swap: revert one, apply another", "", device.seconds(swap))
    other.revert_(base)
    if not all(torch.equal(p, t) for p, t in zip(base.parameters(), original, strict=True)):
        raise SystemExit("the base is not what it was")
    yield device.row("the base after all that", "the same, bit for bit")


def fit(device: Device, *arguments: str) -> tuple[str, float]:
    """``dpp fit`` in this process: the scores of the base, of fine-tuned and of each method and rate; seconds."""
    from dpp_lightning.cli import main

    accelerator = "gpu" if device.name == "cuda" else "cpu"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.devices", "1", "--trainer.accelerator", accelerator]
    device.forget_peak()
    start = time.perf_counter()
    code = main(["fit", *arguments, *quiet])
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"dpp fit {' '.join(arguments)} ended with exit code {code}")
    (results,) = Path().rglob("results.jsonl")
    scores: dict[str, list[float]] = {}
    for row in map(json.loads, results.read_text().splitlines()):
        name = row["method"] if row["pruning_rate"] is None else f"{row['method']} {row['pruning_rate']}"
        scores.setdefault(name, []).append(row["score"])
    return ", ".join(f"{name} {sum(s) / len(s):.3f}" for name, s in scores.items()), seconds


def quickstart(device: Device) -> Iterator[dict]:
    """The quickstart as it is; with small sizes of one epoch."""
    epochs = ["--trainer.max_epochs", "1"] if device.small else []
    yield device.row("dpp fit --config quickstart.yaml", *fit(device, "--config", "quickstart.yaml", *epochs))


def glue_inputs(device: Device) -> list[str]:
    """Options that name an encoder and data; both are made here where none were given."""
    if device.pretrained is None:
        import tiny_glue

        config = tiny_glue.bert_config(**({} if device.small else {**BERT_BASE, "initializer_range": 0.02}))
        device.pretrained = tiny_glue.make_model(Path("encoder").resolve(), config=config)
        device.data = tiny_glue.make_data(Path("data").resolve(), "sst2", device.size(2000, 200), 100)
    return ["--model.pretrained", device.pretrained, "--data.path", device.data]


def glue(device: Device, *fragments: str, case: str = "") -> Iterator[dict]:
    """A recipe of GLUE in bf16-mixed, one epoch: 18 deltas drawn and scored."""
    arguments = ["--config", "bert_sst2_adamr.yaml", *fragments, *glue_inputs(device)]
    scores, seconds = fit(device, *arguments, "--trainer.precision", "bf16-mixed", "--trainer.max_epochs", "1")
    yield device.row(case or "dpp fit --config bert_sst2_adamr.yaml, bf16-mixed", scores, seconds)


def fsdp(device: Device) -> Iterator[dict]:
    """The same in shards of one device, over NCCL on a GPU."""
    yield from glue(device, "--config", "fsdp.yaml", case="the same with --config fsdp.yaml")


REFIT = """trainer:
  callbacks:
    - class_path: DeltaPruneCallback
      init_args:
        method: refit
        pruning_rate: 0.99
        seeds: [0]
        method_settings:
          refit: {{steps: {steps}}}
"""


def refit(device: Device) -> Iterator[dict]:
    """The same recipe with kept values trained by ``refit``, 400 steps."""
    Path("refit.yaml").write_text(REFIT.format(steps=device.size(400, 10)))
    yield from glue(device, "--config", "refit.yaml", case="the same with method refit")


PARTS = {part.__name__: part for part in (tests, adamr, delta, quickstart, glue, fsdp, refit)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--pretrained")
    parser.add_argument("--data")
    options = parser.parse_args()
    with open(options.rows, "a") as file:
        for row in PARTS[options.part](Device(options)):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
