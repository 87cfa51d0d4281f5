"""Greedy generation for a batch of prompts, with a cache of keys and values, by transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dpp_lightning.tensors.shards import is_dtensor


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
) -> list[str]:
    """The model's continuation of each prompt, by the most likely token at each step.

    A text ends at an end-of-sequence token, at a stop string (which is cut off) or after ``max_new_tokens``. Sampling
    and penalties are off, whatever the model's generation config says.

    Args:
        model: a causal language model of transformers, or peft's around one, in evaluation mode.
        tokenizer: its tokenizer.
        prompt_ids: (samples, longest prompt), padded on the left.
        prompt_mask: 1 where there is a token, of the same shape.
        max_new_tokens: at least 1.
        stop_strings: texts that end a sample.

    Returns:
        One text for each prompt, without special tokens.
    """
    config = _greedy(model, tokenizer, max_new_tokens, stop_strings)
    tokens = model.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        generation_config=config,
        tokenizer=tokenizer,
        synced_gpus=is_dtensor(next(model.parameters())),  # in shards every rank takes part in each forward
    )
    texts = tokenizer.batch_decode(tokens[:, prompt_ids.shape[1] :], skip_special_tokens=True)
    return [_before(text, stop_strings) for text in texts]


def _greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stop_strings: Sequence[str]
) -> GenerationConfig:
    """The config of greedy decoding. What it leaves out, transformers would take from the model's own config."""
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        stop_strings=list(stop_strings) or None,
    )


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end-of-sequence token and those of the model's generation config (a chat model has several)."""
    setting = model.generation_config.eos_token_id
    model_ends = setting if isinstance(setting, list) else [setting]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *model_ends) if token is not None))


def _before(text: str, stop_strings: Sequence[str]) -> str:
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    return text[: min(starts)] if starts else text
