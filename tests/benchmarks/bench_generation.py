"""Scoring by generation: batches padded on the left against one sample at a time; the same answers, and their ratio.

python tests/benchmarks/bench_generation.py --model FOLDER --data GSM8K [--samples 64] [--batch 32] [--new 64] [--device cpu]
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpp_lightning.tasks.causal_lm.batches import Collate, Samples, encode
from dpp_lightning.tasks.causal_lm.generation import generate_texts
from dpp_lightning.tasks.causal_lm.prompts import resolve_prompt
from dpp_lightning.tasks.causal_lm.source import Source


def generate_all(model, tokenizer, samples, order, batch, new):
    """Texts of all samples, in their own order, and the seconds it took."""
    collate = Collate(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    texts, start = {}, time.perf_counter()
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        tokens = collate([samples[i] for i in chosen])
        ids, mask = (tokens[name].to(model.device) for name in ("prompt_ids", "prompt_mask"))
        texts |= dict(zip(chosen, generate_texts(model, tokenizer, ids, mask, new), strict=True))
    return texts, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of GSM8K in the hub's layout, or a JSON lines file")
    parser.add_argument("--prompt", default="metamath")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    source = Source(options.data)
    data = source.load()
    rows = source.split(data, "test" if "test" in data else "train").select(range(options.samples))
    samples = Samples(encode(rows, tokenizer, resolve_prompt(options.prompt)), 1024, rows["answer"])
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["prompt_ids"]))
    generate_all(model, tokenizer, samples, order[:4], 4, 4)  # warm up
    one, alone = generate_all(model, tokenizer, samples, order, 1, options.new)
    many, together = generate_all(model, tokenizer, samples, order, options.batch, options.new)
    same = sum(one[i] == many[i] for i in order)
    print(f"one at a time: {alone:.1f} s, {len(order) / alone:.2f} samples a second")
    print(f"batches of {options.batch}: {together:.1f} s, {len(order) / together:.2f} samples a second")
    print(f"ratio {alone / together:.1f}; the same text for {same} of {len(order)} samples")


if __name__ == "__main__":
    main()
