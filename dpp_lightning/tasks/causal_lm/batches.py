"""Questions and answers as tokens, and tokens as batches: padded or packed to train on, with prompts to be scored."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from dpp_lightning.tasks.causal_lm.packing import pack, packed_row
from dpp_lightning.tasks.causal_lm.prompts import Prompt, prompt_tokens
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL

Rows = Mapping[str, list[Any]]


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None) -> Dataset:
    """Tokens of every row, cached by ``datasets`` between runs.

    Args:
        rows: with columns ``question`` and ``answer``.
        tokenizer: has an end-of-sequence token, which ends every answer.
        prompt: ``None`` for the chat template.

    Returns:
        Columns ``input_ids`` (prompt, answer, end), ``answer_start`` (tokens of the prompt in it), ``length``,
        ``prompt_ids`` (what is generated from).
    """
    tokenizer("a")  # the first call changes the state that the cache's key is of
    settings = {"tokenizer": tokenizer, "prompt": prompt}
    return rows.map(_encode, batched=True, fn_kwargs=settings, remove_columns=rows.column_names)


def _encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None) -> dict[str, list[Any]]:
    trained, generated = prompt_tokens(tokenizer, prompt, rows["question"])
    answers = tokenizer(rows["answer"], add_special_tokens=False)["input_ids"]
    whole = [[*first, *answer, tokenizer.eos_token_id] for first, answer in zip(trained, answers, strict=True)]
    return {
        "input_ids": whole,
        "answer_start": [len(first) for first in trained],
        "length": [len(tokens) for tokens in whole],
        "prompt_ids": generated,
    }


class Samples(TorchDataset[Mapping[str, Any]]):
    """Encoded rows. A negative index is a filler of EvaluationSampler: its row, marked as not ``real``.

    Args:
        rows: what :func:`encode` returns.
        references: the answers' texts, for rows that are scored.
        max_length: tokens behind this many are cut off.
    """

    def __init__(self, rows: Dataset, max_length: int, references: Sequence[str] | None = None) -> None:
        self.rows, self.max_length = rows, max_length
        self.references = None if references is None else list(references)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        place = index % len(self.rows)
        row = self.rows[place]
        tokens = row["input_ids"][: self.max_length]
        labels = [IGNORED_LABEL if i < row["answer_start"] else token for i, token in enumerate(tokens)]
        sample = {"input_ids": tokens, "labels": labels}
        if self.references is None:
            return sample
        return {
            **sample,
            "prompt_ids": row["prompt_ids"],
            "reference": self.references[place],
            "real": index >= 0,
        }


class PackedSamples(TorchDataset[list[Mapping[str, Any]]]):
    """Rows of several samples each.

    Args:
        samples: what is packed.
        lengths: tokens of each.
        capacity: tokens of a row.
    """

    def __init__(self, samples: Samples, lengths: Sequence[int], capacity: int) -> None:
        self.samples, self.rows = samples, pack(lengths, capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Mapping[str, Any]]:
        return [self.samples[i] for i in self.rows[index]]


class Collate:
    """Samples to a batch. Tensors of token numbers are (samples, longest) or, packed, (rows, capacity).

    Samples that are scored also give ``prompt_ids`` and ``prompt_mask``, padded on the left, ``references`` (texts) and
    ``real`` (booleans).

    Args:
        pad: token of the padding.
        capacity: tokens of a packed row.
    """

    def __init__(self, pad: int, capacity: int | None = None) -> None:
        self.pad, self.capacity = pad, capacity

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if isinstance(samples[0], list):
            assert self.capacity is not None
            rows = [
                packed_row([(s["input_ids"], s["labels"]) for s in row], self.capacity, self.pad) for row in samples
            ]
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch: dict[str, Any] = {
            "input_ids": _padded([s["input_ids"] for s in samples], self.pad, "right"),
            "attention_mask": _padded([[1] * len(s["input_ids"]) for s in samples], 0, "right"),
            "labels": _padded([s["labels"] for s in samples], IGNORED_LABEL, "right"),
        }
        if "prompt_ids" in samples[0]:
            prompts = [s["prompt_ids"] for s in samples]
            batch["prompt_ids"] = _padded(prompts, self.pad, "left")
            batch["prompt_mask"] = _padded([[1] * len(tokens) for tokens in prompts], 0, "left")
            batch["references"] = [s["reference"] for s in samples]
            batch["real"] = torch.tensor([s["real"] for s in samples])
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
