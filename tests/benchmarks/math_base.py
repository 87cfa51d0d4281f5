"""A small base for the math task: a Qwen2-shaped decoder and its own BPE tokenizer, trained on GSM8K's text alone.

python tests/benchmarks/math_base.py --data GSM8K --output BASE [--epochs 4] [--hidden 192] [--layers 4]
"""

import argparse
import time

import torch
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

END = "<|endoftext|>"
PAD = "<|pad|>"
LENGTH, BATCH, LEARNING_RATE = 256, 8, 1e-3


def make_tokenizer(texts, vocabulary):
    """Byte-level BPE with every digit a token of its own, as Qwen2's."""
    tokenizer = Tokenizer(BPE())
    pieces = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer, hidden, layers):
    """Random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 48,
        num_key_value_heads=hidden // 96,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def pretrain(model, tokens, epochs, report):
    """Next-token prediction on one long stream, cut at another position in each epoch."""
    steps = epochs * (len(tokens) // (LENGTH * BATCH) - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    step, start = 0, time.time()
    for _ in range(epochs):
        offset = int(torch.randint(LENGTH, ()))
        rows = tokens[offset:][: (len(tokens) - offset) // LENGTH * LENGTH].view(-1, LENGTH)
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            if len(batch) < BATCH or step >= steps:
                continue
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 100 == 0:
                report(f"step {step} of {steps}: loss {loss.item():.3f}, {time.time() - start:.0f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="folder of GSM8K in the hub's layout")
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = load_dataset(options.data, "main", split="train")
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    tokenizer = make_tokenizer(texts, options.vocabulary)
    model = make_model(tokenizer, options.hidden, options.layers)
    tokens = torch.tensor([i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True)
    pretrain(model, tokens, options.epochs, lambda line: print(line, flush=True))
    model.eval().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
