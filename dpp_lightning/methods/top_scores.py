"""Selecting the entries with the highest scores, an exact number of them, in one tensor or over several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dpp_lightning.methods.exact_ranking import RankThreshold, TopScores, largest
from dpp_lightning.methods.kept_entries import GrowingBuffer, KeptEntries
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.tensors.shards import is_dtensor

_STRIDE = 16  # of the sample of a tensor that is read as one block


def ranked(pairs: Sequence[TensorPair], counts: Iterable[int], kind: str = "magnitude") -> Iterator[KeptEntries]:
    """Keep exactly ``count`` entries of each tensor, those with the highest scores; where scores are equal, the first.

    Args:
        pairs: the pruned tensors.
        counts: how many are kept of each tensor, in [0, numel].
        kind: which score, see :meth:`dpp_lightning.methods.tensor_pair.TensorPair.scores`.
    """
    for pair, count in zip(pairs, counts, strict=True):
        positions = _in_one_pass(pair, count, kind) if count else None
        if positions is not None:
            yield KeptEntries(positions)
            continue
        threshold = largest(partial(scores_of, [pair], kind), count) if count else None
        yield above(pair, threshold, threshold.ties if threshold else 0, kind)[0]


def _in_one_pass(pair: TensorPair, count: int, kind: str) -> Tensor | None:
    """The positions of the highest scores, read once; None where that is not known to be all of them."""
    top: TopScores | None = None
    if kind == "magnitude" and pair.plain and not pair.one_block:
        top = TopScores.bounded_by(pair.sampled_scores(), count, pair.numel)
        return top.positions() if all(top.add(*found) for found in pair.above(top.bound)) else None
    for start, _, scores in pair.scores(kind):
        if top is None:
            known = pair.one_block or is_dtensor(pair.finetuned)
            sample = scores[::_STRIDE] if known else pair.sampled_scores(kind)
            top = TopScores.bounded_by(sample, count, pair.numel)
        if not top.add_from(start, scores):
            return None
    return None if top is None else top.positions()


def above(
    pair: TensorPair, threshold: RankThreshold | None, ties: int, kind: str = "magnitude"
) -> tuple[KeptEntries, int]:
    """The entries of one tensor above a threshold, and how many of the ``ties`` are left for the tensors after it."""
    kept = GrowingBuffer(torch.int64)
    if threshold is not None:
        for start, _, scores in pair.scores(kind):
            positions, ties = threshold.positions(scores, ties)
            kept.append(positions + start)
    return KeptEntries(kept.tensor()), ties


def scores_of(pairs: Iterable[TensorPair], kind: str) -> Iterator[Tensor]:
    """All scores of some tensors, block by block."""
    for pair in pairs:
        for _, _, scores in pair.scores(kind):
            yield scores
