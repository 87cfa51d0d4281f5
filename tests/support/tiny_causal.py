"""Two-layer decoders, a word tokenizer and sums in words: everything a causal-LM fit needs, without network."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 280
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """Bytes, some words and single digits; ``<end>`` is 0, ``<pad>`` is 1."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["What is the answer? The answer is: "] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<end>",
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )


def make_decoder(kind: str = "qwen2", tied: bool = True, positions: int = 64, seed: int = 0):
    """A seeded decoder with weights large enough for its output to depend on its input."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=positions, **common))
    config, model = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    return model(config(**SIZES, max_position_embeddings=positions, **common))


def save_decoder(folder: Path, kind: str = "qwen2", **settings) -> str:
    """A folder as ``save_pretrained`` writes it, tokenizer included."""
    make_decoder(kind, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def widen_norms(folder: str | Path) -> None:
    """Norms of a saved decoder in float32, with values that bfloat16 would round; the rest stays as it is."""
    file = Path(folder) / "model.safetensors"
    tensors = {n: t.float() + 1e-4 if "norm" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums of one digit with their answers in GSM8K's format."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 4), rng.randint(0, 5)) for _ in range(count)]
    return [{"question": f"What is {a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in pairs]


def write_rows(path: Path, rows: list[dict]) -> str:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
