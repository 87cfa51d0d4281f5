"""vLLM on the CPU as the tests need it: engines in this process, and servers on the loopback.

The CPU engine packs the weights of linear maps and frees them, so that nothing can be overwritten; on GPUs it does not.
Here a plugin of vLLM's own kind, which each of its processes loads, makes it compute with the weights as they are.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import torch

PLUGIN = "vllm_engines:keep_weights"
PROMPT = [(7 * k * k + 5 * k + 3) % 270 + 2 for k in range(40)]  # more than the 32 tokens that the prefix cache goes by
SETTINGS = {
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "block_size": 32,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": True,
}


def keep_weights():
    """The plugin: products by the weights as they were loaded."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    for module in (linear, utils, vocab_parallel_embedding):
        module.dispatch_cpu_unquantized_gemm = plain


def install_plugin(folder: Path) -> list[str]:
    """Write the plugin's entry point into a folder; what has to be on the path of vLLM's processes."""
    metadata = folder / "keep_weights-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: keep-weights\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\nkeep_weights = {PLUGIN}\n")
    return [str(folder), str(Path(__file__).parent)]


def environment() -> dict[str, str]:
    """Variables for vLLM's processes."""
    return {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def engine(model, **settings):
    """A ``vllm.LLM`` whose core is a process of its own."""
    from vllm import LLM
    from vllm.config.weight_transfer import WeightTransferConfig

    llm = LLM(model=str(model), weight_transfer_config=WeightTransferConfig(backend="dpp"), **{**SETTINGS, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def server(model, folder, dtype="float32", *more):
    """vLLM's server on the loopback; its address. ``more``: further arguments of the command. The wheel for the CPU has no metadata that ``vllm serve`` asks for, so
    it is started by its module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "base", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", dtype, "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4", "--block-size", "32", "--enable-prefix-caching",
        "--weight-transfer-config", '{"backend": "dpp"}', *more,
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        path = os.pathsep.join(install_plugin(folder / "packages"))
        environ = {**os.environ, **environment(), "PYTHONPATH": path}
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def tokens_of(llm, prompt=PROMPT, count=16):
    """Greedy tokens of an engine."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, detokenize=False, ignore_eos=True)
    return list(llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0].token_ids)


def checksums(llm):
    """Digest of every tensor that each worker computes with."""
    return llm.collective_rpc("compute_weight_checksums")


def tokens_of_transformers(folder, prompt=PROMPT, count=16):
    """Greedy tokens of the model in a folder, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return made[0, len(prompt) :].tolist()


def _wait(address, process, log, seconds=180):
    """Until the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text()[-4000:]}")
