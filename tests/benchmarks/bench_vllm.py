"""A switch of vLLM between deltas of one base against vLLM's own reload of dense weights. Run by hand.

    FOLDER/bin/python tests/benchmarks/bench_vllm.py [--billions 0.05] [--rates 0.9 0.99 0.999] [--repeats 3] [--folder DIR]

FOLDER is the environment of ``tests/serving/vllm_env.sh``. Llama-shaped bfloat16 models, deltas of all tensors by
``dare``; one engine on the CPU, whose core is a process of its own, then a server. Medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from bench_merge_speed import build
from vllm_engines import engine, environment, install_plugin, server, tokens_of

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.serving.vllm.switch import switch_engine, switch_server
from dpp_lightning.storage.checkpoints import load_tensors


def make_deltas(folder: Path, rate: float) -> list[Path]:
    """Folders of two deltas, and of the dense model of the first."""
    places = [folder / f"{name}-{rate:g}" for name in ("a", "b", "dense")]
    for name, place in zip("ab", places, strict=False):
        prune_checkpoint(folder / "base", folder / name, place, PruningSpec("dare", rate, ord(name), dtype="bfloat16"))
    apply_checkpoint(folder / "base", places[0], places[2])
    return places


def seconds(work, *arguments, **settings) -> float:
    start = time.perf_counter()
    work(*arguments, **settings)
    return time.perf_counter() - start


def measure_server(url: str, rate: float, places: list[Path], repeats: int) -> None:
    """The same switches over HTTP, requests paused and caches emptied."""
    a, b, _ = map(str, places)
    switch_server(url, a)
    switch_server(url, None)
    found = [[seconds(switch_server, url, delta) for delta in (a, b, None)] for _ in range(repeats)]
    print("| {:g} | {:.2f} | {:.2f} | {:.2f} |".format(rate, *map(statistics.median, zip(*found, strict=True))))


def measure(llm, rate: float, places: list[Path], repeats: int) -> None:
    """One row: the first switch, which also asks the loader, then switches and reloads in turn."""
    a, b, dense = map(str, places)
    first = seconds(switch_engine, llm, a)
    switch_engine(llm, None)
    found: dict[str, list[float]] = {"on": [], "other": [], "base": [], "dense": []}
    for _ in range(repeats):
        found["on"].append(seconds(switch_engine, llm, a))
        switched = tokens_of(llm)
        found["other"].append(seconds(switch_engine, llm, b))
        found["base"].append(seconds(switch_engine, llm, None))
        found["dense"].append(seconds(llm.collective_rpc, "reload_weights", kwargs={"weights_path": dense}))
        llm.reset_prefix_cache()
        assert tokens_of(llm) == switched
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(places[0].parent / "base")})
        llm.reset_prefix_cache()
    on, other, base, whole = map(statistics.median, found.values())
    size = delta_bytes(places[0]) / 1e6
    print(f"| {rate:g} | {size:.2f} | {first:.2f} | {on:.2f} | {other:.2f} | {base:.2f} | {whole:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.05)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.99, 0.999])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where the models are made, default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, options.billions)
        entries = sum(tensor.numel() for tensor in load_tensors(folder / "base").values())
        places = {rate: make_deltas(folder, rate) for rate in options.rates}
        os.environ.update(environment())
        sys.path[:0] = install_plugin(folder / "packages")
        print(f"{entries / 1e6:.0f} M entries")
        print("| p | delta, MB | first switch | base to delta | delta to delta | delta to base | dense reload |")
        with engine(folder / "base", dtype="bfloat16") as llm:
            print(f"16 tokens after a prompt of 40: {seconds(tokens_of, llm):.2f} s")
            for rate in options.rates:
                measure(llm, rate, places[rate], options.repeats)
        print("| p | base to delta | delta to delta | delta to base |, over HTTP")
        (folder / "http").mkdir()
        with server(folder / "base", folder / "http", "bfloat16", "--skip-tokenizer-init") as url:
            for rate in options.rates:
                measure_server(url, rate, places[rate], options.repeats)


if __name__ == "__main__":
    main()
