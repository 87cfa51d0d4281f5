"""Loaders of vLLM of many kinds: after every switch the weights are those of vLLM's own reload of the dense model."""

from importlib.util import find_spec

import pytest
import torch
from vllm_engines import checksums, engine, environment, install_plugin

from dpp_lightning import prune
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.serving.vllm.switch import switch_engine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, see tests/serving/vllm_env.sh"),
]

LLAMA = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
OLDER = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},  # transposed
    "phi3": LLAMA,  # query, key and value are one tensor in the files too
    "gemma2": {**LLAMA, "head_dim": 32},
    "gemma3_text": {**LLAMA, "head_dim": 32},
    "qwen3": {**LLAMA, "head_dim": 32},
    "olmo2": LLAMA,
    "starcoder2": LLAMA,
    "opt": {**OLDER, "ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {**OLDER, "intermediate_size": 96, "max_position_embeddings": 128},
    "bloom": {"vocab_size": 256, "hidden_size": 64, "n_layer": 2, "n_head": 2},  # heads in another order
    "falcon": {**OLDER, "alibi": False},  # the same
}


@pytest.fixture
def folder(kind, tmp_path, monkeypatch):
    """``base``, the deltas ``pruned`` and ``carrying``, and the dense model of each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    for place in install_plugin(tmp_path / "packages"):
        monkeypatch.syspath_prepend(place)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    base, finetuned = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter, value in zip(finetuned.parameters(), base.parameters(), strict=True):
            parameter.copy_(value + 0.05 * torch.randn_like(value))
    base.save_pretrained(tmp_path / "base")
    deltas = {
        "pruned": prune(base, finetuned, "magnitude", 0.7),
        "carrying": prune(base, finetuned, "dare", 0.9, scope="linear", outside="carry"),
    }
    for name, delta in deltas.items():
        delta.save_pretrained(tmp_path / name)
        apply_checkpoint(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-dense")
    return tmp_path


@pytest.mark.parametrize("kind", CONFIGS)
def test_switches_are_reloads(kind, folder):
    with engine(folder / "base", dtype="bfloat16") as llm:

        def reloaded(name):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / name)})
            return checksums(llm)

        expected = {name: reloaded(f"{name}-dense") for name in ("pruned", "carrying")}
        expected[None] = reloaded("base")
        for name in ("pruned", "carrying", None, "carrying", "pruned", None):
            switch_engine(llm, None if name is None else str(folder / name))
            assert checksums(llm) == expected[name], name
