"""Packing: several samples in one row of tokens, told apart by positions that start again at 0."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign samples to rows, longest first, each to the fullest row that still has room (best fit).

    Args:
        lengths: tokens of each sample, each in [1, capacity].
        capacity: tokens of a row.

    Returns:
        For each row the indices of its samples; every sample once.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), in rising order
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fullest = bisect_left(room, (lengths[sample], -1))  # the first row, of rising room, that has enough
        left, row = room.pop(fullest) if fullest < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(room, (left - lengths[sample], row))
    return rows


def packed_row(samples: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad: int) -> dict[str, Tensor]:
    """One row of a batch: ``input_ids``, ``labels`` and ``position_ids``, each of shape (length,).

    Positions start at 0 in each sample, by which transformers tells them apart; ``attention_mask`` must not be given.
    The first token of a sample has no label, or the sample before it would have to predict it. Padding fills the rest
    of the row, as a sample without labels.

    Args:
        samples: tokens and labels of each.
        length: tokens of the row, at least those of the samples.
        pad: token that fills the row.
    """
    tokens = [token for ids, _ in samples for token in ids]
    labels = [label for _, sample_labels in samples for label in (IGNORED_LABEL, *sample_labels[1:])]
    positions = [i for ids, _ in samples for i in range(len(ids))]
    missing = length - len(tokens)
    return {
        "input_ids": torch.tensor([*tokens, *[pad] * missing]),
        "labels": torch.tensor([*labels, *[IGNORED_LABEL] * missing]),
        "position_ids": torch.tensor([*positions, *range(missing)]),
    }


@torch.no_grad()
def check_packing_isolates(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> None:
    """Refuse packing for a model in which a packed sample attends to the one before it.

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
            f"{type(model).__name__} lets a packed sample attend to the one before it (logits change by {change:.3g} "
            f"of {scale:.3g}); set data.packing to false"
        )
