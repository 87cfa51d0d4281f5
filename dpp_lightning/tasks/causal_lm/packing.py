"""Packing: several samples in one row of tokens, kept apart by positions that start again at 0."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share samples out to rows, longest first, each to the fullest row that still has room (best fit).

    Args:
        lengths: tokens of each sample, each in [1, capacity].
        capacity: tokens of a row.

    Returns:
        For each row the positions of its samples; every sample once.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), rising
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[sample], -1))
        left, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(room, (left - lengths[sample], row))
    return rows


def packed_row(samples: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad: int) -> dict[str, Tensor]:
    """One row of a batch: ``input_ids``, ``labels`` and ``position_ids``, each of shape (length,).

    Each sample's positions start at 0, by which transformers knows where one ends (no ``attention_mask`` may be given).
    The first token of a sample is no label, or the sample before would be asked for it. What is left is a sample of
    padding without labels.

    Args:
        samples: tokens and labels of each.
        length: tokens of the row, at least those of the samples.
        pad: token of the padding.
    """
    tokens = [token for ids, _ in samples for token in ids]
    labels = [label for _, of_sample in samples for label in (IGNORED_LABEL, *of_sample[1:])]
    positions = [i for ids, _ in samples for i in range(len(ids))]
    missing = length - len(tokens)
    return {
        "input_ids": torch.tensor([*tokens, *[pad] * missing]),
        "labels": torch.tensor([*labels, *[IGNORED_LABEL] * missing]),
        "position_ids": torch.tensor([*positions, *range(missing)]),
    }


@torch.no_grad()
def check_kept_apart(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> None:
    """Refuse packing for a model in which a packed sample sees the one before it.

    Args:
        model: a causal language model of transformers.
        first, second: tokens of two samples.

    Raises:
        ValueError: the second sample's logits change with the first before it.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    row = packed_row([(first, first), (second, second)], len(first) + len(second), 0)
    inputs = {name: row[name][None].to(device) for name in ("input_ids", "position_ids")}
    packed = model(**inputs, use_cache=False).logits[0, len(first) :]
    alone = model(input_ids=torch.tensor([list(second)], device=device), use_cache=False).logits[0]
    model.train(training)
    change, scale = (packed - alone).abs().max().item(), alone.abs().max().item()
    if change > (0.05 if alone.dtype in (torch.bfloat16, torch.float16) else 1e-3) * max(scale, 1e-6):
        raise ValueError(
            f"{type(model).__name__} lets a packed sample see the one before it (logits change by {change:.3g} of "
            f"{scale:.3g}); set data.packing to false"
        )
