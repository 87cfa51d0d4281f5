"""Products of a batch with what deltas change of one weight, each row with its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpp_lightning.serving.batch_rows import BatchRows, RowGroup
from dpp_lightning.tensors.factors import Factors


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
        return _Bags((positions % inputs).astype(np.int32), self.differences.numpy(), starts.astype(np.int32))

    @cached_property
    def by_output_of_transposed(self) -> _Bags:
        """Of a weight (inputs, outputs)."""
        _, outputs = self.shape
        positions = self.positions.numpy()
        columns = positions % outputs
        order = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns[order], np.arange(outputs, dtype=positions.dtype))
        rows = (positions // outputs)[order].astype(np.int32)
        return _Bags(rows, self.differences.numpy()[order], starts.astype(np.int32))


class _Bags(NamedTuple):
    """Changes of a weight by output: the input of each, its difference, and where the changes of each output begin."""

    inputs: NDArray[np.int32]
    differences: NDArray[np.float32]
    starts: NDArray[np.int32]


class Inputs:
    """What a weight is multiplied with; kept for the next weight, which often has the same inputs."""

    def __init__(self, inputs: Tensor, rows: BatchRows) -> None:
        self._inputs, self._rows = inputs.reshape(rows.size, -1, inputs.shape[-1]), rows
        self._tables: dict[int, Tensor] = {}

    def of(self, delta: int) -> Tensor:
        """The rows of a delta, shape (rows, places, features)."""
        return self._inputs[self._rows.of(delta)]

    def table(self, number: int) -> Tensor:
        """Those of a group with features first, float32, shape (deltas * features, rows of each * places)."""
        if number not in self._tables:
            group, features = self._rows.groups[number], self._inputs.shape[-1]
            places = self._inputs[group.rows].reshape(len(group.deltas), -1, features).transpose(1, 2)
            self._tables[number] = places.reshape(len(group.deltas) * features, -1).float()
        return self._tables[number]


class MapChanges:
    """What the deltas of a batch change of a linear map ``x W^T + b``.

    Args:
        rows: of the batch.
        weights, biases: of each delta; None where it leaves them alone. Those that are whole are left out.
        shape: outputs and inputs of the map.
        transposed: the weight is (inputs, outputs).
    """

    def __init__(
        self,
        rows: BatchRows,
        weights: Sequence[WeightChange | None],
        biases: Sequence[WeightChange | None],
        shape: tuple[int, int],
        *,
        transposed: bool,
    ) -> None:
        self._rows, self._weights, self._biases = rows, weights, biases
        self._shape, self._transposed = shape, transposed
        self._joined: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, inputs: Inputs, outputs: Tensor) -> None:
        """Add what each row's delta changes to the outputs, in place.

        Args:
            inputs: of the map.
            outputs: shape (rows, places, outputs).
        """
        for number, group in enumerate(self._rows.groups):
            if number not in self._joined:
                self._joined[number] = self._join(group, outputs.device)
            bags, biases = self._joined[number]
            if bags or biases:
                _add_to(outputs, group.rows, self._products(number, len(group.deltas), inputs, bags, biases))
        for delta, weight in enumerate(self._weights):
            if weight is not None and weight.factors is not None:
                added = _product(inputs.of(delta), weight.factors, transposed=self._transposed)
                _add_to(outputs, self._rows.of(delta), added)

    def _products(self, number: int, deltas: int, inputs: Inputs, bags: list[Tensor], biases: list[Tensor]) -> Tensor:
        """What is added to the rows of a group, shape (deltas, rows of each * places, outputs)."""
        table = inputs.table(number)
        if bags:
            columns, starts, values = bags
            products = F.embedding_bag(columns, table, starts, mode="sum", per_sample_weights=values)
        else:
            products = table.new_zeros(deltas * self._shape[0], table.shape[1])
        if biases:
            places, values = biases
            products.index_add_(0, places, values[:, None].expand(-1, products.shape[1]))
        return products.view(deltas, self._shape[0], -1).transpose(1, 2)

    def _join(self, group: RowGroup, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """The changes of a group's deltas as bags of one table, in which one delta's features follow another's: rows
        of the table, starts and values; and of the biases, rows of the products and values."""
        outputs, features = self._shape
        weights, biases = ([changes[delta] for delta in group.deltas] for changes in (self._weights, self._biases))
        sizes = [0 if weight is None else len(weight.positions) for weight in weights]
        columns, values = np.empty(sum(sizes), np.int32), np.empty(sum(sizes), np.float32)
        starts, first = np.empty(len(sizes) * outputs, np.int32), 0
        for place, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
            here = starts[place * outputs : (place + 1) * outputs]
            if weight is None or not size:
                here[:] = first
                continue
            bags = weight.by_output_of_transposed if self._transposed else weight.by_output
            np.add(bags.inputs, place * features, out=columns[first : first + size])
            np.add(bags.starts, first, out=here)
            values[first : first + size] = bags.differences
            first += size
        places = [bias.positions.numpy() + place * outputs for place, bias in enumerate(biases) if bias is not None]
        differences = [bias.differences.numpy() for bias in biases if bias is not None]
        return (
            _tensors(device, columns, starts, values) if first else [],
            _tensors(device, np.concatenate(places), np.concatenate(differences)) if places else [],
        )


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


def _tensors(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def _product(inputs: Tensor, factors: Factors, *, transposed: bool) -> Tensor:
    left, right = factors.left.to(inputs), factors.right.to(inputs)
    return inputs @ left @ right if transposed else inputs @ right.t() @ left.t()


def _add_to(outputs: Tensor, rows: slice | Tensor, added: Tensor) -> None:
    """Add to some rows of the outputs in place.

    Args:
        outputs: shape (rows of the batch, places, outputs).
        rows: some of them.
        added: the same rows in any shape whose last dimension is the outputs.
    """
    if isinstance(rows, slice):
        outputs[rows].view(added.shape).add_(added)
    else:
        outputs.index_add_(0, rows.to(outputs.device), added.reshape(len(rows), *outputs.shape[1:]).to(outputs.dtype))
