"""Products of a batch with what deltas change of one weight, each row with its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpp_lightning.serving.batch_rows import BatchRows
from dpp_lightning.tensors.factors import Factors

_Bags = tuple[Tensor, Tensor, Tensor]  # the input of every change, where those of each output begin, the differences


class CannotMixError(ValueError):
    """A model, delta or batch of which the rows cannot have deltas of their own.

    Args:
        reason: beginning with the name of a tensor.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: use one delta at a time (pool.use, or pool.map, which groups the requests)")


@dataclass(frozen=True)
class WeightChange:
    """What a delta changes of one tensor of a model, as a mixed batch needs it.

    Attributes:
        shape: of the tensor.
        positions: sorted distinct flat positions, int32 or int64, shape (changed,), in the CPU's memory.
        differences: fine-tuned minus base there, float32, shape (changed,), in the CPU's memory.
        factors: a product that is added besides.
        whole: all of the fine-tuned tensor, of any shape, in place of the rest; of a vector, or of a tensor (1, ...),
            beside it.
    """

    shape: torch.Size
    positions: Tensor
    differences: Tensor
    factors: Factors | None = None
    whole: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of it: positions twice, by tensor and by output, where each output's begin, and differences."""
        whole = 0 if self.whole is None else self.whole.nbytes
        return 2 * self.positions.nbytes + self.differences.nbytes + 8 * max(self.shape[-2:], default=0) + whole

    def dense(self, base: Tensor) -> Tensor:
        """The whole fine-tuned tensor, of the base's dtype and on its device.

        Args:
            base: the model's.
        """
        if self.whole is not None:
            return self.whole
        added = torch.zeros(base.numel()) if self.factors is None else self.factors.product()
        added.index_add_(0, self.positions.long(), self.differences)
        return (base.detach().float() + added.view(base.shape).to(base.device)).to(base.dtype)

    @cached_property
    def by_output(self) -> _Bags:
        """Of a weight (outputs, inputs)."""
        outputs, inputs = self.shape
        positions = self.positions.numpy()
        starts = np.searchsorted(positions, np.arange(outputs, dtype=positions.dtype) * inputs)
        return _bags(positions % inputs, starts, self.differences)

    @cached_property
    def by_output_of_transposed(self) -> _Bags:
        """Of a weight (inputs, outputs)."""
        _, outputs = self.shape
        positions = self.positions.numpy()
        columns = positions % outputs
        order = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns[order], np.arange(outputs, dtype=positions.dtype))
        return _bags((positions // outputs)[order], starts, self.differences[torch.from_numpy(order)])


def _bags(inputs: NDArray[Any], starts: NDArray[Any], differences: Tensor) -> _Bags:
    return torch.from_numpy(inputs.astype(np.int32)), torch.from_numpy(starts.astype(np.int32)), differences


class Inputs:
    """What a weight is multiplied with; kept for the next weight, which often has the same inputs."""

    def __init__(self, inputs: Tensor, rows: BatchRows) -> None:
        self._inputs, self._rows = inputs.reshape(rows.size, -1, inputs.shape[-1]), rows
        self._tables: dict[int, Tensor] = {}

    def of(self, delta: int) -> Tensor:
        """The rows of a delta, shape (rows * places, features)."""
        return self._inputs[self._rows.of(delta)].flatten(0, 1)

    def table(self, delta: int) -> Tensor:
        """The same with features first, float32, shape (features, rows * places)."""
        if delta not in self._tables:
            self._tables[delta] = self.of(delta).t().float().contiguous()
        return self._tables[delta]


def add_products(
    inputs: Inputs,
    outputs: Tensor,
    rows: BatchRows,
    weights: Sequence[WeightChange | None],
    biases: Sequence[WeightChange | None],
    *,
    transposed: bool,
) -> None:
    """Add what each row's delta changes of a linear map ``x W^T + b`` to the outputs, in place.

    Args:
        inputs: of the map.
        outputs: shape (rows, places, outputs).
        rows: of the batch.
        weights, biases: of each delta; None where it leaves them alone.
        transposed: the weight is (inputs, outputs).
    """
    for delta, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight is not None and weight.factors is not None:
            left, right = weight.factors.left.to(inputs.of(delta)), weight.factors.right.to(inputs.of(delta))
            product = inputs.of(delta) @ left @ right if transposed else inputs.of(delta) @ right.t() @ left.t()
            _add_to(outputs, rows.of(delta), product)
        if weight is not None and len(weight.positions):
            bags, table = weight.by_output_of_transposed if transposed else weight.by_output, inputs.table(delta)
            columns, starts, values = (tensor.to(table.device) for tensor in bags)
            sums = F.embedding_bag(columns, table, starts, mode="sum", per_sample_weights=values)
            if bias is not None:
                _add_bias(sums, bias)
            _add_to(outputs, rows.of(delta), sums.t())
        elif bias is not None:
            sums = torch.zeros(outputs.shape[-1], len(inputs.of(delta)), device=outputs.device)
            _add_bias(sums, bias)
            _add_to(outputs, rows.of(delta), sums.t())


def add_embedded(ids: Tensor, outputs: Tensor, change: WeightChange) -> None:
    """Add what a delta changes of the embeddings of some ids, in place.

    Args:
        ids: shape (places,).
        outputs: shape (places, dim), contiguous.
        change: of a table (words, dim).
    """
    if change.factors is not None:
        added = change.factors.left.to(ids.device)[ids] @ change.factors.right.to(ids.device)
        outputs += added.to(outputs.dtype)
    if len(change.positions):
        dim, positions = outputs.shape[1], change.positions.numpy()
        starts = ids.cpu().numpy().astype(positions.dtype) * dim
        first, last = (np.searchsorted(positions, bound) for bound in (starts, starts + dim))
        places = np.repeat(np.arange(len(starts)), last - first)
        entries = np.arange(len(places)) + np.repeat(first - np.cumsum(last - first) + last - first, last - first)
        flat = torch.from_numpy(positions[entries] - starts[places] + places * dim)
        values = change.differences[torch.from_numpy(entries)]
        outputs.view(-1).index_add_(0, flat.to(outputs.device), values.to(outputs))


def _add_bias(sums: Tensor, bias: WeightChange) -> None:
    """Add the changes of a bias to sums of shape (outputs, places), in place."""
    differences = bias.differences.to(sums.device)[:, None].expand(-1, sums.shape[1])
    sums.index_add_(0, bias.positions.to(sums.device), differences)


def _add_to(outputs: Tensor, rows: slice | Tensor, added: Tensor) -> None:
    """Add to some rows of the outputs in place.

    Args:
        outputs: shape (rows of the batch, places, outputs).
        rows: some of them.
        added: shape (rows * places, outputs).
    """
    if isinstance(rows, slice):
        outputs[rows].view(added.shape).add_(added)
    else:
        outputs.index_add_(0, rows.to(outputs.device), added.reshape(len(rows), *outputs.shape[1:]).to(outputs.dtype))
