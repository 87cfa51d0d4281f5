"""Statistics of all entries of a delta together, as the papers' tables give them of their models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.pruning.finetuned_source import read_finetuned
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.checkpoints import load_tensors

_CELLS = 1 << 16


@dataclass(frozen=True)
class EntryStatistics:
    """Of the entries of fine-tuned minus base weights.

    Attributes:
        mean_abs: mean of the absolute values.
        variance: of the values, dividing by their number.
        min, max: the least and the greatest value.
        p10, p90: the values below which a tenth and nine tenths lie, to 0.4 % of themselves.
    """

    mean_abs: float
    variance: float
    min: float
    p10: float
    p90: float
    max: float

    @classmethod
    def of(cls, pairs: Iterable[TensorPair]) -> EntryStatistics:
        """Read pairs of tensors once, in blocks.

        Raises:
            ValueError: there is no entry, or weights are not finite.
        """
        counts = torch.zeros(_CELLS, dtype=torch.int64)
        sums = torch.zeros(3, dtype=torch.float64)  # of |δ|, δ and δ²
        least, greatest, number = float("inf"), float("-inf"), 0
        for pair in pairs:
            for _, delta in pair.deltas():
                counts += torch.bincount(_cells(delta), minlength=_CELLS)
                wide = delta.double()
                sums += torch.stack([wide.abs().sum(), wide.sum(), wide.square().sum()])
                least, greatest = min(least, float(delta.min())), max(greatest, float(delta.max()))
                number += len(delta)
        if not number or not bool(torch.isfinite(sums).all()):
            raise ValueError("the delta has no entries, or weights that are not finite, and so no statistics")
        mean_abs, mean, square = (sums / number).tolist()
        low, high = (_value_at(counts, share) for share in (0.1, 0.9))
        return cls(mean_abs, square - mean * mean, least, low, high, greatest)

    @classmethod
    def between(cls, base: str | Path, finetuned: str | Path) -> EntryStatistics:
        """Of two models that are folders, files or hub ids; of the tensors that pruning takes by default.

        Raises:
            FileNotFoundError: no such model.
            ValueError: models that do not match, are equal, or are not finite.
        """
        tuned = read_finetuned(finetuned, None, base=base)
        plan = PruningPlan.of(load_tensors(base), tuned.tensors, Scope(), files=tuned.exact)
        return cls.of(plan.pairs)


def _cells(values: Tensor) -> Tensor:
    """The upper half of every float32's bits, ordered as the values are."""
    upper = values.view(torch.int32) >> 16  # sign and magnitude, of which bfloat16 consists
    magnitude = upper & 0x7FFF
    return torch.where(upper < 0, 0x7FFF - magnitude, 0x8000 + magnitude).long()


def _value_at(counts: Tensor, share: float) -> float:
    """The value below which a share of all lies: the middle of its cell."""
    index = int(torch.searchsorted(counts.cumsum(0), share * int(counts.sum())))
    magnitude = index - 0x8000 if index >= 0x8000 else 0x7FFF - index
    middle = torch.tensor((magnitude << 16) | 0x8000, dtype=torch.int32).view(torch.float32)
    return float(middle) if index >= 0x8000 else -float(middle)
