"""The merge itself: sources read side by side in the order of their names, one tensor of each in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod

import torch
from torch import Tensor

from dpp_lightning.delta.contents import DeltaInfo, SparseTensor
from dpp_lightning.delta.task_heads import for_tasks
from dpp_lightning.merging.sources import MergeSource, names_in_base
from dpp_lightning.merging.weights import Weights, delta_weights
from dpp_lightning.methods.kept_entries import GrowingBuffer
from dpp_lightning.methods.merge_rules import WeightedEntries, get_merge, trimmed
from dpp_lightning.sampling.sampler import exact_rate
from dpp_lightning.storage.checkpoints import Progress
from dpp_lightning.tensors.dtypes import check_dtype, to_dtype
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries

_BLOCK = 1 << 22  # entries of a tensor that are merged at once


class Merger:
    """Deltas of one base that fit together, with what their merge holds besides kept entries.

    Args:
        base: canonical name to the base's tensor, possibly mapped from a file.
        base_name, base_revision: for the file.
        sources: the deltas.
        method, weights, scale, trim_rate, dtype: as in :func:`dpp_lightning.merging.merge_deltas.merge`.

    Attributes:
        carried, new_rows: dense tensors of the merged delta.
        seeded: all deltas keep the same entries by one seed, so the merged one needs no positions either.

    Raises:
        ValueError: see :func:`dpp_lightning.merging.merge_deltas.merge`; all before a kept entry is merged.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        base_name: str | None,
        sources: Sequence[MergeSource],
        method: str,
        weights: Weights | None,
        scale: float = 1.0,
        trim_rate: float | None = None,
        dtype: str | None = None,
        base_revision: str | None = None,
    ) -> None:
        self.method, self.row, self.sources, self.base = method, get_merge(method), sources, base
        self.base_name, self.base_revision, self.dtype = base_name, base_revision, dtype
        _check_settings(method, weights, scale, trim_rate)
        check_dtype(dtype)
        self.scale, self.trim_rate = scale, trim_rate
        self.weights = delta_weights(weights, [source.task for source in sources], self.row.weight)
        self._names = names_in_base(sources, base, base_name or "the base")
        self.table = self._table()
        self._check_conflicts()
        self.carried = for_tasks({source.task: source.carried for source in sources})
        self.new_rows = dict(sources[0].new_rows)
        first = sources[0].info
        self.seeded = self.row.keeps_all and all(
            s.info.seeded and (s.info.seed, s.info.pruning_rate) == (first.seed, first.pruning_rate)
            and dict(s.table) == self.table
            for s in sources
        )  # fmt: skip
        self._check, self._kept = EntriesHash(), 0

    def parts(self, progress: Progress | None = None) -> Iterator[tuple[str, SparseTensor]]:
        """Name and kept entries of one merged tensor after the other.

        Raises:
            ValueError: a delta that proves to be another base's at its end, or values that overflow the dtype.
        """
        self._check, self._kept = EntriesHash(), 0
        streams = [self._stream(source, names) for source, names in zip(self.sources, self._names, strict=True)]
        coming = [{names[own] for own, _ in s.table} for s, names in zip(self.sources, self._names, strict=True)]
        sizes = {name: self.base[name].element_size() * prod(shape) for name, shape in self.table.items()}
        done, total = 0, sum(sizes.values())
        for name, shape in self.table.items():
            found = [self._part(k, next(stream)[1], name) for k, stream in enumerate(streams) if name in coming[k]]
            yield name, self._merged(name, shape, found)
            del found
            done += sizes[name]
            if progress:
                progress(done, total)
        for stream in streams:
            next(stream, None)  # to its end, where it is checked as a whole

    def info(self) -> DeltaInfo:
        """The merged delta's description, once :meth:`parts` is at its end."""
        first, infos = self.sources[0].info, [source.info for source in self.sources]
        total = sum(prod(shape) for shape in self.table.values())
        left = {
            names[n]
            for s, names in zip(self.sources, self._names, strict=True)
            for n in (*s.info.reverted, *s.info.unchanged)
        }
        unchanged = tuple(sorted(left - set(self.table)))
        dense = sum(t.numel() for part in (self.carried, self.new_rows) for t in part.values())
        prints = {info.base_fingerprint for info in infos}
        used = {n: self.base[n] for n in (*self.table, *unchanged)} if len(prints) > 1 else {}
        rate = min(round(1 - self._kept / max(total, 1), 6), 0.999999)
        return DeltaInfo(
            method=self.method,
            pruning_rate=first.pruning_rate if self.seeded else max(rate, 0.0),
            seed=first.seed if self.seeded else 0,
            q=1.0,
            seeded=self.seeded,
            base_name=self.base_name or first.base_name,
            base_revision=self.base_revision or (None if self.base_name else first.base_revision),
            base_fingerprint=hash_tensors(used) if used else first.base_fingerprint,
            base_check=self._check.hexdigest(),
            base_first=self._check.first,
            entries=total + sum(self.base[n].numel() for n in unchanged) + dense,
            dense_bytes=max(info.dense_bytes for info in infos),
            dtype=self.dtype,
            settings=self._settings(),
            unchanged=unchanged,
            prefix=first.prefix,
            names={own: saved for info in reversed(infos) for own, saved in info.names.items()},
        )

    def _table(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a delta prunes, sorted."""
        shapes: dict[str, tuple[int, ...]] = {}
        for source, names in zip(self.sources, self._names, strict=True):
            for own, shape in source.table:
                if shapes.setdefault(names[own], shape) != shape:
                    raise ValueError(
                        f"{names[own]}: {source.task} has the shape {shape}, another delta {shapes[names[own]]}. Bring "
                        "the vocabularies to one size, or prune these deltas again with that tensor carried (--carry)"
                    )
        return dict(sorted(shapes.items()))

    def _check_conflicts(self) -> None:
        """Refuse what has no meaning in a merge: a tensor here pruned and there carried, vocabularies that differ."""
        for source in self.sources:
            both = sorted(set(source.carried) & set(self.table))
            if both:
                raise ValueError(
                    f"{source.task} carries {', '.join(both[:5])} as dense tensors, which other deltas prune: prune "
                    "all with the same scope (--scope, --include, --exclude, --carry)"
                )
        first = self.sources[0]
        for source in self.sources[1:]:
            for name in sorted({*first.new_rows, *source.new_rows}):
                a, b = first.new_rows.get(name), source.new_rows.get(name)
                if a is None or b is None or a.shape != b.shape or not torch.equal(a, b):
                    counts = [0 if rows is None else len(rows) for rows in (a, b)]
                    raise ValueError(
                        f"{name}: {first.task} added {counts[0]} rows to the vocabulary, {source.task} {counts[1]}, "
                        "and they are not the same: prune the deltas again with that tensor carried (--carry), which "
                        "keeps it for each task"
                    )

    def _stream(self, source: MergeSource, names: Mapping[str, str]) -> Iterator[tuple[str, SparseTensor]]:
        """A source's tensors in the order of the merge; one that was written in another order is read whole."""
        stream, order = source.checked(self.base, names), [names[own] for own, _ in source.table]
        return stream if order == sorted(order) else iter(sorted(stream, key=lambda item: item[0]))

    def _part(self, k: int, part: SparseTensor, name: str) -> WeightedEntries:
        indices, values = part.indices, part.values
        if self.trim_rate is not None:
            indices, values = trimmed(indices, values, prod(part.shape), self.trim_rate)
        return WeightedEntries(indices, values, self.weights[k](name), self.sources[k].info.q)

    def _merged(self, name: str, shape: tuple[int, ...], found: Sequence[WeightedEntries]) -> SparseTensor:
        numel, short = prod(shape), torch.int32 if prod(shape) < 2**31 else torch.int64
        indices, merged = GrowingBuffer(short), GrowingBuffer(torch.float32)
        for start in range(0, numel, _BLOCK):
            size = min(_BLOCK, numel - start)
            own, values = self.row.rule([_between(part, start, size) for part in found], size, self.scale)
            indices.append(own.to(short) + start)
            merged.append(values)
        kept = indices.tensor()
        self._check.update(gather_entries(self.base[name], kept))
        self._kept += len(kept)
        values = merged.tensor()
        return SparseTensor(shape, kept, to_dtype(values, self.dtype, values, name))

    def _settings(self) -> dict[str, object]:
        plain = [weight.plain() for weight in self.weights]
        settings: dict[str, object] = {
            "tasks": [source.task for source in self.sources],
            "sources": [f"{s.info.method} p={s.info.pruning_rate:g} seed={s.info.seed}" for s in self.sources],
            "weights": "for each tensor" if None in plain else plain,
            "scale": self.scale,
        }
        return settings if self.trim_rate is None else {**settings, "trim_rate": self.trim_rate}


def _between(part: WeightedEntries, start: int, size: int) -> WeightedEntries:
    """The entries of a block, by their positions in it."""
    bounds = torch.tensor([start, start + size], dtype=part.indices.dtype)
    first, last = torch.searchsorted(part.indices, bounds).tolist()
    return WeightedEntries(part.indices[first:last] - start, part.values[first:last], part.weight, part.q)


def _check_settings(method: str, weights: Weights | None, scale: float, trim_rate: float | None) -> None:
    if method == "adamerging" and weights is None:
        raise ValueError(
            "adamerging merges with trained weights: train them by dpp fit --config adamerging_glue.yaml and give the "
            "coefficients.json that it writes (--weights)"
        )
    if not isfinite(scale):
        raise ValueError(f"scale multiplies the merged delta and must be a finite number, got {scale!r}")
    if trim_rate is not None:
        exact_rate(trim_rate)
        if method != "ties":
            raise ValueError(f"trim_rate belongs to ties, got it for {method}: prune the deltas at that rate instead")
