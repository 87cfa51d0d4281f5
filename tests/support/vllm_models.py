"""A tiny base with fine-tunings as deltas, and each delta's dense model beside it."""

import torch
from tiny_causal import VOCABULARY, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dpp_lightning import merge, prune
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint

KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def make_base(kind="qwen2", tied=True, seed=0):
    """Two layers of width 64, two heads that share one key; weights large enough for varied tokens."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3, "tie_word_embeddings": tied,
        "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1,
    }  # fmt: skip
    config, model = KINDS[kind]
    return model(config(**settings))


def finetuned_of(base, seed):
    model = type(base)(base.config)
    model.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def make_folders(folder, kind="qwen2", tied=True):
    """``base``; the deltas ``A``, ``B``, one that carries tensors, and a merge; the dense model of each; a delta of another
    base."""
    base = make_base(kind, tied)
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    other = make_base(kind, tied, seed=9)
    prune(other, finetuned_of(other, 4), "dare", 0.9).save_pretrained(folder / "of_other")
    deltas = {
        "A": prune(base, finetuned_of(base, 1), "magnitude", 0.7),
        "B": prune(base, finetuned_of(base, 2), "dare", 0.9, dtype="bfloat16"),
        "carrying": prune(base, finetuned_of(base, 3), "magnitude", 0.7, scope="linear", outside="carry"),
    }
    deltas["merged"] = merge(base, {"a": deltas["A"], "b": deltas["B"]})
    for name, delta in deltas.items():
        delta.save_pretrained(folder / name)
        apply_checkpoint(folder / "base", folder / name, folder / f"{name}-dense")
    return folder


def dense_folder(folder, name):
    return folder / ("base" if name is None else f"{name}-dense")
