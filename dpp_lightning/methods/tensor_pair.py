"""A pair: one tensor of two models side by side, read in blocks so that it may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.kept_entries import true_positions
from dpp_lightning.tensors.factors import Factors
from dpp_lightning.tensors.shards import full_tensor, is_dtensor

_LEAST_INPUT = 0.01  # of the mean over features: an input that calibration never saw move still gets a chance

_LEAST_APART = 32  # lengths of a run from one run of a sample to the next
BLOCK = 1 << 19  # entries; a multiple of what the sampler draws at once
_FEW = 32  # of so many entries one is computed by itself, of more the whole block
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class TensorPair:
    """One tensor in the base and in the fine-tuned model.

    Attributes:
        name: canonical name.
        shape: of the entries in common.
        inputs: what the weight's input features did on calibration data, where that is known.
        block: the block of the model that it belongs to, such as ``layers.3.``; None outside the blocks.
        linear: it is the weight of a linear map inside a block.
        base, finetuned: those entries, one-dimensional in C order (views where the tensors are contiguous, so that
            files mapped into memory are read only where they are looked at); tensors in shards as they are, to be
            gathered while their blocks are read.
        factors: a product that is not part of the delta: ``deltas`` and ``scores`` are of theta - theta_0 - product.
    """

    name: str
    shape: tuple[int, ...]
    base: Tensor
    finetuned: Tensor
    inputs: InputStatistics | None = None
    block: str | None = None
    linear: bool = False
    factors: Factors | None = None

    @classmethod
    def of(
        cls,
        name: str,
        base: Tensor,
        finetuned: Tensor,
        inputs: InputStatistics | None = None,
        *,
        block: str | None = None,
        linear: bool = False,
    ) -> TensorPair:
        """Two tensors of one shape, or of two that differ in their number of rows: then the common rows."""
        rows = min(len(base), len(finetuned)) if finetuned.dim() else 0
        if base.shape != finetuned.shape:
            base, finetuned = base[:rows], finetuned[:rows]
        shape = tuple(finetuned.shape)
        base, finetuned = base.detach(), finetuned.detach()
        if not is_dtensor(finetuned):
            base, finetuned = base.reshape(-1), finetuned.reshape(-1)
        return cls(name, shape, base, finetuned, inputs, block, linear)

    @cached_property
    def leading_directions(self) -> dict[int, Tensor]:
        """Left singular vectors of the delta, by how many; what :mod:`dpp_lightning.methods.low_rank` has found."""
        return {}

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.finetuned.numel()

    @property
    def one_block(self) -> bool:
        """Whether it is read as a single block."""
        return self.numel <= BLOCK

    def deltas(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of theta - theta_0: first flat position, float32 on the CPU, shape (at most BLOCK,)."""
        delta = self._reader()
        for start in range(0, self.numel, BLOCK):
            yield start, delta(slice(start, start + BLOCK))

    def row_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First row and delta of rows together, float32, shape (rows, columns); of another rank than 2 one column."""
        columns = self.shape[1] if len(self.shape) == 2 else 1
        rows = self.numel // max(columns, 1)
        step = max(BLOCK // max(columns, 1), 1)
        delta = self._reader()
        for start in range(0, rows, step):
            yield start, delta(slice(start * columns, min(start + step, rows) * columns)).view(-1, columns)

    def _reader(self) -> Callable[[slice], Tensor]:
        """Gives theta - theta_0 at a range of flat positions; of tensors in shards their difference is gathered now."""
        if is_dtensor(self.finetuned):
            delta = full_tensor(self.finetuned.float() - self.base.float()).reshape(-1)
            return lambda block: self._without_product(delta[block].cpu(), block)

        def difference(block: slice) -> Tensor:
            finetuned, base = self.finetuned[block].cpu(), self.base[block].cpu().float()
            wide = finetuned.float()
            delta = wide - base if wide is finetuned else wide.sub_(base)  # new memory is used again
            return self._without_product(delta, block)

        return difference

    def _without_product(self, delta: Tensor, block: slice) -> Tensor:
        """A range of the delta less that of the product of the factors."""
        return delta if self.factors is None else delta - self.factors.entries(block.start, block.start + len(delta))

    def delta(self) -> Tensor:
        """theta - theta_0, less the product of the factors: the whole tensor, float32 on the CPU, of its shape."""
        return self._reader()(slice(0, self.numel)).view(self.shape)

    def delta_at(self, positions: Tensor) -> Tensor:
        """theta - theta_0, less the product of the factors, at sorted flat positions: float32, shape (positions,)."""
        found = [torch.empty(0)]
        for start, delta in self.deltas():
            first, last = torch.searchsorted(positions, torch.tensor([start, start + len(delta)])).tolist()
            found.append(delta[positions[first:last] - start])
        return torch.cat(found)

    def scores(self, kind: str = "magnitude") -> Iterator[tuple[int, Tensor, Tensor]]:
        """Blocks of deltas with their scores: first flat position, delta, score >= 0, both float32.

        Args:
            kind: ``magnitude`` is |delta|; ``wanda`` is |delta| times the root mean square of the input feature of a
                linear map, |delta| for all else; ``activation`` is the same with embeddings by how often a token came.
        """
        score = self._scorer(kind)
        for start, delta in self.deltas():
            yield start, delta, score(start, delta)

    @property
    def plain(self) -> bool:
        """Whether :meth:`above` can read it: no shards, no product, one dtype of at most 32 bits, on the CPU."""
        dtypes = {self.base.dtype, self.finetuned.dtype}
        return (
            self.factors is None and not is_dtensor(self.finetuned) and len(dtypes) == 1 and dtypes <= _BITS.keys()
            and self.base.device.type == self.finetuned.device.type == "cpu"
        )  # fmt: skip

    def above(self, bound: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Entries with |delta| >= bound, and those that are not finite: flat positions, int64, and |delta|, float32.

        Of a :attr:`plain` pair. The difference is taken in the tensors' own dtype, whose rounding keeps the order, so
        that no entry is missed; only those found are computed in float32. One buffer serves all blocks: new memory for
        each block costs more than the arithmetic.

        Args:
            bound: a float32 number >= 0.
        """
        dtype = self.base.dtype
        room, limit = torch.empty(min(BLOCK, self.numel), dtype=dtype), torch.tensor(bound, dtype=torch.float32)
        bits = room.view(_BITS[dtype]).numpy()
        mask, least = np.iinfo(bits.dtype).max, int(limit.to(dtype).view(_BITS[dtype]))
        for start in range(0, self.numel, BLOCK):
            base, finetuned = self.base[start : start + BLOCK], self.finetuned[start : start + BLOCK]
            torch.sub(finetuned, base, out=room[: len(base)])
            size = np.bitwise_and(bits[: len(base)], mask, out=bits[: len(base)])
            found = true_positions(size >= least)
            if len(found) > len(base) // _FEW:
                delta = (finetuned.float() - base.float()).abs()[found]
            else:
                delta = (finetuned[found].float() - base[found].float()).abs()
            kept = true_positions(~(delta.numpy() < np.float32(bound)))
            yield found[kept] + start, delta[kept]

    def sampled_scores(self, kind: str = "magnitude", runs: int = 64, length: int = 1024) -> Tensor:
        """Scores of a few of the entries, in runs at equal distances, float32, one-dimensional.

        Args:
            kind: as of :meth:`scores`.
            runs: how many at most; of a small tensor fewer.
            length: entries of a run.
        """
        runs = max(min(runs, self.numel // (_LEAST_APART * length)), 1)
        apart = self.numel // runs
        if kind == "magnitude" and self.plain:
            base, finetuned = (t[: runs * apart].view(runs, apart)[:, :length] for t in (self.base, self.finetuned))
            return (finetuned.float() - base.float()).abs().reshape(-1)
        delta, score = self._reader(), self._scorer(kind)
        starts = [run * apart for run in range(runs)]
        return torch.cat([score(start, delta(slice(start, min(start + length, self.numel)))) for start in starts])

    def _scorer(self, kind: str) -> Callable[[int, Tensor], Tensor]:
        """Gives the scores of a range of entries, from its first flat position and their delta."""
        scale = None if kind == "magnitude" else self._input_scale(embeddings=kind == "activation")

        def score(start: int, delta: Tensor) -> Tensor:
            size = delta.abs()
            if scale is not None:
                size *= scale[self._features(torch.arange(start, start + len(delta)))]
            return size

        return score

    def _input_scale(self, *, embeddings: bool) -> Tensor | None:
        """A factor for each input feature, those of one expert after the other, float32, one-dimensional."""
        if self.inputs is None or (self.inputs.embedding and not embeddings):
            return None
        rms = self.inputs.rms[..., : self.shape[self.inputs.axis]].flatten()
        return rms.clamp_min(_LEAST_INPUT * float(rms.mean())).float()

    def _features(self, positions: Tensor) -> Tensor:
        """The input feature of each flat position, as an index into :meth:`_input_scale`."""
        assert self.inputs is not None
        (rows, columns), axis = self.shape[-2:], self.inputs.axis
        last = axis == len(self.shape) - 1
        features = positions % columns if last else positions // columns % rows
        return features if len(self.shape) == 2 else features + positions // (rows * columns) * self.shape[axis]
