"""The tensors of a model that a delta changes: what is in them, and overwriting it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.tensors.flat_entries import gather_entries, scatter_entries
from dpp_lightning.tensors.names import NamedTensor
from dpp_lightning.tensors.shards import is_dtensor, local_tensor, shard_like
from dpp_lightning.tensors.threads import in_order, over_threads

Values = tuple[Tensor, Tensor | None]  # of one tensor: at the entries that change, or all of a carried one; of new rows


class DeltaTarget:
    """A model, or state dict, in which a delta's tensors were found.

    Args:
        found: the delta's name of every tensor that it changes to the target's tensor.
        named: the same names to where these lie in the target.
        changed: the pruned tensors among them; the others are carried.
        new_rows: names of those of which the base has fewer rows, to the further ones.
    """

    def __init__(
        self,
        found: Mapping[str, Tensor],
        named: Mapping[str, NamedTensor],
        changed: Mapping[str, SparseTensor],
        new_rows: Mapping[str, Tensor],
    ) -> None:
        self.found, self.named, self.changed, self.new_rows = found, named, changed, new_rows

    def check_writable(self) -> None:
        """Overwrite one entry of each kind of tensor with itself, so that what cannot be written is found here.

        Raises:
            ValueError: a dtype whose entries torch cannot overwrite, such as float8, or a tensor of inference mode
                outside of it.
        """
        kinds: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        for name, named in self.named.items():
            for owner, _ in named.pieces:
                if (local := local_tensor(owner)).numel():
                    kind = local.dtype, local.device, local.is_contiguous(), local.is_inference(), name in self.changed
                    kinds.setdefault(kind, (name, local))
        for name, tensor in kinds.values():
            try:
                _rewrite_first(tensor, sparse=name in self.changed)
            except (RuntimeError, TypeError) as error:
                of_inference = ", made in inference mode" if tensor.is_inference() else ""
                raise ValueError(
                    f"{name}: entries of a tensor of {tensor.dtype}{of_inference} cannot be overwritten, so nothing "
                    "was written; load the model outside of inference mode, in float32, bfloat16, float16 or float64"
                ) from error

    def entries(self) -> dict[str, Tensor]:
        """What the target holds at the entries that the delta changes, of every pruned tensor, shapes (changed,)."""
        return self.over_tensors(lambda name: gather_entries(self.found[name], self.changed[name].changed))

    def held(self, entries: Mapping[str, Tensor]) -> dict[str, Values]:
        """All that applying overwrites, copied.

        Args:
            entries: what :meth:`entries` gave.
        """
        return {
            name: (
                entries[name] if name in self.changed else tensor.detach().clone(),
                self._rows(name).clone() if name in self.new_rows else None,
            )
            for name, tensor in self.found.items()
        }

    def fitted(self, values: Mapping[str, Values]) -> dict[str, Values]:
        """Values in the devices, dtypes and shards of the target, which may have been cast or moved since they were
        taken; they are the same tensors wherever nothing is to be done."""
        return {name: (self._fitted(name, whole), rows) for name, (whole, rows) in values.items()}

    def write(self, values: Mapping[str, Values]) -> None:
        """Overwrite all that the delta changes.

        Args:
            values: from :meth:`fitted`.
        """
        sizes = {n: self.changed[n].num_changed if n in self.changed else t.numel() for n, t in self.found.items()}
        over_threads(lambda name: self._write(name, *values[name]), sizes)
        for name, tensor in self.found.items():
            self.named[name].store(tensor)

    def over_tensors(self, work: Callable[[str], Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """``work(name)`` of pruned tensors, all or those named; in one order where they lie in shards, as collectives
        need it."""
        in_shards = any(is_dtensor(tensor) for tensor in self.found.values())
        sizes = {name: self.changed[name].num_changed for name in (self.changed if names is None else names)}
        return in_order(work, sizes) if in_shards else over_threads(work, sizes)

    def _rows(self, name: str) -> Tensor:
        """The rows of a tensor that the base's vocabulary does not have."""
        return self.found[name].detach()[self.changed[name].shape[0] :]

    def _fitted(self, name: str, values: Tensor) -> Tensor:
        target = self.found[name]
        return values.to(target.device, target.dtype) if name in self.changed else shard_like(values, target)

    def _write(self, name: str, values: Tensor, rows: Tensor | None) -> None:
        target = self.found[name]
        if name not in self.changed:
            target.detach().copy_(values)
            return
        scatter_entries(target, self.changed[name].changed, values)
        if rows is not None:
            self._rows(name).copy_(rows)


@torch.no_grad()
def _rewrite_first(tensor: Tensor, *, sparse: bool) -> None:
    if sparse:
        first = torch.zeros(1, dtype=torch.int64)
        scatter_entries(tensor, first, gather_entries(tensor, first))
        return
    corner = tensor.detach()[(slice(0, 1),) * tensor.dim()]
    corner.copy_(corner.clone())
