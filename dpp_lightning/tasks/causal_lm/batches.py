"""Questions and answers as tokens, and tokens as batches: padded or packed for training, with prompts for scoring."""

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
        Columns ``input_ids`` (prompt, answer, end), ``answer_start`` (how many of them are the prompt), ``length``, and
        ``prompt_ids`` (what is generated from).
    """
    tokenizer("a")  # the first call changes the tokenizer's state, which is hashed into the key of the cache
    settings = {"tokenizer": tokenizer, "prompt": prompt}
    return rows.map(_encode, batched=True, fn_kwargs=settings, remove_columns=rows.column_names)


def _encode(rows: Rows, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None) -> dict[str, list[Any]]:
    trained, generated = prompt_tokens(tokenizer, prompt, rows["question"])
    answers = tokenizer(rows["answer"], add_special_tokens=False)["input_ids"]
    samples = [[*question, *answer, tokenizer.eos_token_id] for question, answer in zip(trained, answers, strict=True)]
    return {
        "input_ids": samples,
        "answer_start": [len(question) for question in trained],
        "length": [len(tokens) for tokens in samples],
        "prompt_ids": generated,
    }


class Samples(TorchDataset[Mapping[str, Any]]):
    """Encoded rows; a negative index, EvaluationSampler's filler, gives its row marked as not ``real``.

    Args:
        rows: what :func:`encode` returns.
        max_length: tokens beyond this many are cut off.
        references: the answers as texts, for rows that are scored.
    """

    def __init__(self, rows: Dataset, max_length: int, references: Sequence[str] | None = None) -> None:
        self.rows, self.max_length = rows, max_length
        self.references = None if references is None else list(references)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        position = index % len(self.rows)
        row = self.rows[position]
        tokens = row["input_ids"][: self.max_length]
        labels = [IGNORED_LABEL if i < row["answer_start"] else token for i, token in enumerate(tokens)]
        sample = {"input_ids": tokens, "labels": labels}
        if self.references is None:
            return sample
        return {
            **sample,
            "prompt_ids": row["prompt_ids"],
            "reference": self.references[position],
            "real": index >= 0,
        }

    def select(self, indices: Sequence[int]) -> "Samples":
        """The samples at some indices, in their order."""
        references = None if self.references is None else [self.references[i] for i in indices]
        return Samples(self.rows.select(indices), self.max_length, references)


class PackedSamples(TorchDataset[list[Mapping[str, Any]]]):
    """Rows of several samples each.

    Args:
        samples: the samples that are packed.
        lengths: tokens of each sample, at most ``capacity``.
        capacity: tokens of a row.
    """

    def __init__(self, samples: Samples, lengths: Sequence[int], capacity: int) -> None:
        self.samples, self.rows = samples, pack(lengths, capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Mapping[str, Any]]:
        return [self.samples[i] for i in self.rows[index]]


class Collate:
    """Makes a batch of samples: integer tensors (samples, longest), or (rows, capacity) where samples are packed.

    A batch holds ``input_ids``, ``labels`` and ``attention_mask``, in place of which packed samples have
    ``position_ids``. Samples that are scored also give ``prompt_ids`` and ``prompt_mask``, padded on the left,
    ``references`` (texts) and ``real`` (booleans).

    Args:
        pad: token that fills up a row.
        capacity: tokens of a packed row; ``None`` where no samples are packed.
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
