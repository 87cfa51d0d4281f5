"""A pair: one tensor of two models side by side, read in blocks so that it may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

BLOCK = 1 << 19  # entries; a multiple of what the sampler draws at once


@dataclass(frozen=True)
class Pair:
    """One tensor in the base and in the fine-tuned model.

    Attributes:
        name: canonical name.
        shape: of the entries in common.
        base, finetuned: those entries, one-dimensional in C order (views where the tensors are contiguous, so that
            files mapped into memory are read only where they are looked at).
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    finetuned: Tensor

    @classmethod
    def of(cls, name: str, base: Tensor, finetuned: Tensor) -> Pair:
        """Two tensors of one shape, or of two that differ in their number of rows: then the common rows."""
        rows = min(len(base), len(finetuned)) if finetuned.dim() else 0
        if base.shape != finetuned.shape:
            base, finetuned = base[:rows], finetuned[:rows]
        return cls(name, tuple(finetuned.shape), base.detach().reshape(-1), finetuned.detach().reshape(-1))

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.finetuned.numel()

    def deltas(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of theta - theta_0: first flat position, float32 on the CPU, shape (at most BLOCK,)."""
        for start in range(0, self.numel, BLOCK):
            stop = start + BLOCK
            yield start, self.finetuned[start:stop].cpu().float() - self.base[start:stop].cpu().float()
