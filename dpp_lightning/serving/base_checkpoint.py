"""A base's checkpoint on disk, and the values that turn an engine which holds it into base plus delta, and back.

An engine such as vLLM packs a model's tensors in its own way and gives none of them back; it takes values under the
names of the checkpoint. So the base's values to go back to are read from its files, which are mapped and touched at the
entries that change: exact in any dtype of the engine, however often it is switched, and without a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dpp_lightning.delta.contents import DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.empty_delta import warning_if_empty
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.match_tensors import base_samples, check_digest, find_tensors, wrong_base_message
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.locate import few_names
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.flat_entries import EntriesHash, add_rescaled, gather_entries
from dpp_lightning.tensors.names import named_tensors


class NewValues(NamedTuple):
    """Values of one tensor of the checkpoint that an engine is to overwrite.

    Attributes:
        indices: distinct flat positions in C order, int64, shape (changed,), in no order; None for all of the tensor.
        values: shape (changed,), in the base's dtype or, of a carried tensor, in its own.
    """

    indices: Tensor | None
    values: Tensor


@dataclass(frozen=True)
class TensorChange:
    """What a delta makes of one tensor of the base.

    Attributes:
        indices: sorted distinct flat positions that change, int64, shape (changed,); None for all.
        values: gives the new values at these positions, shape (changed,).
        originals: the base's values there, shape (changed,).
    """

    indices: Tensor | None
    values: Callable[[], Tensor]
    originals: Tensor


Changes = Mapping[str, TensorChange]  # the base's files' name of each tensor that changes; empty for the base itself


class BaseCheckpoint:
    """The base that an engine has loaded, in its files.

    Args:
        source: folder, file or hub id, as the engine was given it.
        revision: branch, tag or commit of a hub id.

    Attributes:
        tensors: name in the files to tensor, views of mapped pages; tied tensors once.

    Raises:
        FileNotFoundError: no such folder, or one without weights.
        ValueError: no model, or quantised or damaged weights.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        check_model(source, "base", revision)
        self._source = str(source)
        named = named_tensors(load_tensors(source, revision))
        self.tensors = {n.source: n.tensor for n in named}
        self._by_name = {n.name: n.tensor for n in named}

    def changes(
        self, delta: str | Path, *, revision: str | None = None, task: str | None = None, force: bool = False
    ) -> dict[str, TensorChange]:
        """A delta read and checked against the base, all of it, so that nothing can fail for the delta's sake later.

        Args:
            delta: folder or hub id.
            revision: branch, tag or commit of a hub id.
            task: of a merged delta with a head for each task, the one that is wanted.
            force: although the delta is of another base.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: a damaged delta, another base, tensors that the base lacks or has in another shape, a vocabulary
                that grew, or values that are not finite.
        """
        contents = warning_if_empty(DeltaReader.open(delta, revision).contents.for_task(task), str(delta))
        if contents.new_rows:
            raise ValueError(
                f"{delta} adds rows to {few_names(contents.new_rows)} (a vocabulary that grew), for which a running "
                "server has no room; serve the dense model that dpp apply writes"
            )
        names = self._names(contents)
        return {**self._pruned(contents, names, force=force), **self._carried(contents.carried, names)}

    def new_values(self, present: Changes, wanted: Changes) -> Iterator[tuple[str, NewValues]]:
        """What to overwrite in an engine that holds the base with ``present`` so that it holds it with ``wanted``.

        Yields:
            Name in the files, in their order, and the new values of each tensor that either of them changes: the base's
            where only ``present`` has others.
        """
        for name, base in self.tensors.items():
            if name in present or name in wanted:
                yield name, _new_values(base, present.get(name), wanted.get(name))

    def dense(self, wanted: Changes) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base plus delta, one after the other, for engines that take whole tensors alone."""
        for name, base in self.tensors.items():
            change = wanted.get(name)
            if change is None:
                yield name, base
            elif change.indices is None:
                yield name, change.values().view(base.shape)
            else:
                yield name, base.reshape(-1).index_copy(0, change.indices, change.values()).view(base.shape)

    def _names(self, contents: DeltaContents) -> dict[str, str]:
        """Canonical name of each tensor of a delta to the name in the base's files."""
        shapes: dict[str, tuple[int, ...] | None] = dict(contents.table)
        shapes |= {name: tuple(tensor.shape) for name, tensor in contents.carried.items()}
        found = find_tensors(shapes, self._by_name, self._source, contents.info())
        by_tensor = {id(tensor): file_name for file_name, tensor in self.tensors.items()}
        return {name: by_tensor[id(tensor)] for name, tensor in found.items()}

    def _pruned(self, contents: DeltaContents, names: Mapping[str, str], *, force: bool) -> dict[str, TensorChange]:
        info, check = contents.info(), EntriesHash()
        changes: dict[str, TensorChange] = {}
        for name, sparse in contents.tensors():
            base = self.tensors[names[name]]
            held = gather_entries(base, sparse.changed)
            check.update(held)
            if not force and check.first not in ("", info.base_first):
                raise ValueError(wrong_base_message(self._source, check.first, info))
            if held.numel():
                changes[names[name]] = _change(name, base, held, sparse, info)
        if not force:
            check_digest(check, info, base_samples(contents, self._by_name, self._source), self._source)
        return changes

    def _carried(self, carried: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, TensorChange]:
        changes: dict[str, TensorChange] = {}
        for name, tensor in carried.items():
            base = self.tensors[names[name]]
            if torch.equal(tensor, base):
                continue
            if not tensor.is_floating_point() or bool(tensor.isnan().any()):
                kind = "NaN" if tensor.is_floating_point() else str(tensor.dtype)
                raise ValueError(f"{name}: a server cannot be switched to a tensor of {kind}; serve the dense model")
            changes[names[name]] = TensorChange(None, partial(tensor.reshape, -1), base.reshape(-1))
        return changes


def _change(name: str, base: Tensor, held: Tensor, sparse: SparseTensor, info: DeltaInfo) -> TensorChange:
    """The change of one pruned tensor; that by a product is dense, so it is computed again when it is asked for."""
    values = add_rescaled(held, *sparse.change(info.q))
    if not is_finite(values):
        raise ValueError(f"{name}: theta_0 + value / q is not finite in {base.dtype} at q={info.q:g}; use a larger q")
    if sparse.factors is None:
        return TensorChange(sparse.indices.long(), lambda: values, held)
    flat = base.reshape(-1)
    return TensorChange(None, lambda: add_rescaled(flat, *sparse.change(info.q)), flat)


def _new_values(base: Tensor, present: TensorChange | None, wanted: TensorChange | None) -> NewValues:
    """The new values of one tensor, wherever it may change."""
    if wanted is None:
        assert present is not None
        return NewValues(present.indices, present.originals)
    if present is None or wanted.indices is None:
        return NewValues(wanted.indices, wanted.values())
    if present.indices is None:
        return NewValues(None, present.originals.index_copy(0, wanted.indices, wanted.values()))
    rest = _among(present.indices, wanted.indices, base.numel()).logical_not_().nonzero().view(-1)
    indices = torch.cat([present.indices.index_select(0, rest), wanted.indices])
    return NewValues(indices, torch.cat([present.originals.index_select(0, rest), wanted.values()]))


def _among(indices: Tensor, others: Tensor, entries: int) -> Tensor:
    """Which of a tensor's positions are among others, shape (indices,); both sorted and distinct, others not empty."""
    if len(others) < entries // 128:  # few, so that looking them up is cheaper than a mark for every entry
        place = torch.searchsorted(others, indices).clamp_(max=len(others) - 1)
        return others.index_select(0, place) == indices
    return torch.zeros(entries, dtype=torch.bool).index_fill_(0, others, True).index_select(0, indices)
