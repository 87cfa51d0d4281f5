"""Merging: several pruned deltas of one base become one delta, tensor by tensor, on their kept entries alone.

Factors are joined: a sum of products is one product of more columns and rows. The deltas are read side by side in the
order of their tensors' names, so that one tensor of each is in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path

import torch
from torch import Tensor

from dpp_lightning.delta.contents import TASK_SEPARATOR, DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.empty_delta import warning_if_empty
from dpp_lightning.delta.folder import DeltaReader, write_files
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.merging.products import sum_of_products
from dpp_lightning.merging.sources import MergeSource, matched_to_base
from dpp_lightning.merging.weights import Weights, delta_weights
from dpp_lightning.methods.kept_entries import GrowingBuffer
from dpp_lightning.methods.merge_rules import WeightedEntries, get_merge, trimmed, weighted_sum
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.sampling.sampler import exact_rate
from dpp_lightning.storage.checkpoints import Progress, load_tensors
from dpp_lightning.storage.checkpoints import Weights as BaseWeights
from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.model_folder import merged_side_files
from dpp_lightning.storage.output_folder import DELTA, output_folder
from dpp_lightning.storage.safe_text import printable
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.dtypes import check_dtype, to_dtype
from dpp_lightning.tensors.fingerprint import hash_tensors
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries, samples_of
from dpp_lightning.tensors.names import canonical_tensors

_BLOCK = 1 << 18  # entries of a tensor that are merged at once; their sums fit into the cache


def merge(
    base: BaseWeights,
    deltas: Mapping[str, SparseDelta | str | Path] | Sequence[SparseDelta | str | Path],
    method: str = "task-arithmetic",
    weights: Weights | None = None,
    *,
    tasks: Sequence[str] | None = None,
    scale: float = 1.0,
    trim_rate: float | None = None,
    dtype: str | None = None,
) -> SparseDelta:
    """Merge deltas of one base in memory: theta_merged = theta_0 + sum_k weight_k delta_k, or by TIES.

    Args:
        base: the base's weights: module, state dict, local folder or file, or hub id. Read at kept entries only.
        deltas: SparseDeltas, or folders or hub ids of deltas; a mapping names their tasks.
        method: ``task-arithmetic``, ``ties``, or ``adamerging`` (task arithmetic with trained weights).
        weights: one number for all deltas, one for each, or for each a mapping of tensor names and glob patterns to
            numbers; default 0.4 for task arithmetic, 1 for TIES. ``adamerging`` has no default.
        tasks: names of the deltas, in their order; default the folders' names.
        scale: multiplies the merged delta.
        trim_rate: TIES' own pruning of each delta's tensors before the merge, the fraction dropped, in [0, 1); default
            none, as the deltas are pruned.
        dtype: how kept values and the numbers of factors are held; default float32.

    Returns:
        One delta. Carried tensors that differ between the deltas, such as heads, are in it for each task:
        ``merge(...).for_task("sst2")``.

    Raises:
        ValueError: deltas of another base (all are named), of tensors that do not fit together, unknown method, weights
            that do not fit, settings out of range, or deltas with factors where the method goes by kept entries.
        FileNotFoundError: no such delta.
    """
    settings = _MergeSettings(method, weights, scale, trim_rate, dtype)
    if isinstance(base, str | Path):
        check_model(base, "base")
    tensors = canonical_tensors(load_tensors(base) if isinstance(base, str | Path) else base)
    name = str(base) if isinstance(base, str | Path) else None
    listed = list(deltas.values()) if isinstance(deltas, Mapping) else list(deltas)
    names = tasks or (list(deltas) if isinstance(deltas, Mapping) else None)
    opened = [DeltaReader.open(d) if isinstance(d, str | Path) else d for d in listed]
    return SparseDelta.from_contents(_Merger(tensors, MergeSource.all(opened, names), settings, name).contents())


def merge_checkpoints(
    base: str | Path,
    deltas: Sequence[str | Path],
    output: str | Path,
    method: str = "task-arithmetic",
    weights: Weights | None = None,
    *,
    tasks: Sequence[str] | None = None,
    scale: float = 1.0,
    trim_rate: float | None = None,
    dtype: str | None = None,
    base_revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Merge delta folders into one, a tensor at a time; whole or not at all.

    Configuration and tokenizer files that lie beside the deltas go along: under their own name where all have the same,
    else as ``TASK.config.json``.

    Args:
        base: as in :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        deltas: folders or hub ids.
        output: folder of the merged delta: new, empty, or with ``overwrite`` an older delta's; none of the inputs, nor
            inside or around one (:mod:`dpp_lightning.storage.output_folder`).
        method, weights, tasks, scale, trim_rate, dtype: as in :func:`merge`.
        base_revision: of a hub id.
        overwrite: replace an older delta in the output folder, at once when the new one is complete.
        progress: called with the bytes of the merged tensors that are done, and all of them.

    Raises:
        ValueError: as :func:`merge`; or the output is, holds or lies in an input.
        FileNotFoundError: no such delta or base.
        FileExistsError: the output folder holds something that is not to be replaced.
        OSError: it cannot be written.
    """
    settings = _MergeSettings(method, weights, scale, trim_rate, dtype)
    inputs = [("base", base), *(("delta", delta) for delta in deltas)]
    with output_folder(output, DELTA, overwrite=overwrite, inputs=inputs) as folder:
        check_model(base, "base", base_revision)
        sources = MergeSource.all([DeltaReader.open(delta) for delta in deltas], tasks)
        tensors = canonical_tensors(load_tensors(base, base_revision))
        merger = _Merger(tensors, sources, settings, str(base), base_revision)
        folders = {s.task: s.folder for s in sources if s.folder is not None}
        side_files = merged_side_files(folders, {s.task: s.info.absent_files for s in sources})
        contents = merger.contents(progress)
        write_files(folder, contents, seeded=merger.seeded, dtype=dtype, factors_dtype=dtype, side_files=side_files)
    return local_path(output)


@dataclass(frozen=True)
class _MergeSettings:
    """How deltas are merged, see :func:`merge`; checked when it is made.

    Raises:
        ValueError: an unknown method or dtype, or a setting out of range or of another method.
    """

    method: str
    weights: Weights | None
    scale: float
    trim_rate: float | None
    dtype: str | None

    def __post_init__(self) -> None:
        get_merge(self.method)
        check_dtype(self.dtype)
        if self.method == "adamerging" and self.weights is None:
            raise ValueError(
                "adamerging merges with trained weights: train them by dpp fit --config adamerging_glue.yaml and give "
                "the coefficients.json that it writes (--weights)"
            )
        if not isfinite(self.scale):
            raise ValueError(f"scale multiplies the merged delta and must be a finite number, got {self.scale!r}")
        if self.trim_rate is not None:
            exact_rate(self.trim_rate)
            if self.method != "ties":
                raise ValueError(
                    f"trim_rate belongs to ties, got it for {self.method}: prune the deltas at that rate instead"
                )


class _Merger:
    """Deltas of one base that fit together.

    Args:
        base: canonical name to the base's tensor, possibly mapped from a file.
        sources: the deltas.
        settings: how they are merged.
        base_name, base_revision: for the file.

    Attributes:
        seeded: all deltas keep the same entries by one seed, so the merged one needs no positions either.

    Raises:
        ValueError: see :func:`merge`; all before a kept entry is merged.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        sources: Sequence[MergeSource],
        settings: _MergeSettings,
        base_name: str | None = None,
        base_revision: str | None = None,
    ) -> None:
        self.sources, self.settings = sources, settings
        self.base_name, self.base_revision = base_name, base_revision
        self.row = get_merge(settings.method)
        self.weights = delta_weights(settings.weights, [source.task for source in sources], self.row.weight)
        self.base, self._names = matched_to_base(sources, base, base_name or "the base")
        self._check_factors()
        self._shapes = self._merged_shapes()
        self._check_conflicts()
        self._carried = _merge_carried({source.task: source.contents.carried for source in sources})
        self._new_rows = dict(sources[0].contents.new_rows)
        self._check_patterns()
        first = sources[0].info
        self.seeded = self.row.keeps_all and all(
            s.info.seeded and not s.factored
            and (s.info.seed, s.info.pruning_rate, s.info.drawn_rate)
            == (first.seed, first.pruning_rate, first.drawn_rate)
            and dict(s.contents.table) == self._shapes
            for s in sources
        )  # fmt: skip
        self._check, self._kept = EntriesHash(), 0
        _warn_of_one_seed(sources)

    def contents(self, progress: Progress | None = None) -> DeltaContents:
        """The merged delta; reading its tensors merges them.

        Raises (in reading):
            ValueError: a delta that proves to be another base's at its end, or values that overflow the dtype.
        """
        merged = DeltaContents(
            list(self._shapes.items()), lambda: self._tensors(progress), self._carried, self._new_rows, self._info
        )
        return warning_if_empty(merged, "the merged delta")

    def _tensors(self, progress: Progress | None) -> Iterator[tuple[str, SparseTensor]]:
        """Name and kept entries of one merged tensor after the other."""
        self._check, self._kept = EntriesHash(), 0
        pairs = list(zip(self.sources, self._names, strict=True))
        streams = [self._stream(source, names) for source, names in pairs]
        pruned = [{names[name] for name, _ in source.contents.table} for source, names in pairs]
        sizes = {name: self.base[name].element_size() * prod(shape) for name, shape in self._shapes.items()}
        done, total = 0, sum(sizes.values())
        for name, shape in self._shapes.items():
            tensors = {k: next(stream)[1] for k, stream in enumerate(streams) if name in pruned[k]}
            yield name, self._merged(name, shape, tensors)
            del tensors  # before the next tensors are read
            done += sizes[name]
            if progress:
                progress(done, total)
        for stream in streams:
            next(stream, None)  # to its end, where it is checked as a whole

    def _info(self) -> DeltaInfo:
        """The merged delta's description, once its tensors are read to the end."""
        first, infos = self.sources[0].info, [source.info for source in self.sources]
        total = sum(prod(shape) for shape in self._shapes.values())
        left_alone = {
            names[name]
            for source, names in zip(self.sources, self._names, strict=True)
            for name in (*source.info.reverted, *source.info.unchanged)
        }
        unchanged = tuple(sorted(left_alone - set(self._shapes)))
        dense = sum(t.numel() for t in (*self._carried.values(), *self._new_rows.values()))
        rate = min(round(1 - self._kept / max(total, 1), 6), 0.999999)
        return DeltaInfo(
            method=self.settings.method,
            pruning_rate=first.pruning_rate if self.seeded else max(rate, 0.0),
            seed=first.seed if self.seeded else 0,
            q=1.0,
            seeded=self.seeded,
            drawn_rate=first.drawn_rate if self.seeded else None,
            base_name=printable(self.base_name) if self.base_name else first.base_name,
            base_revision=self.base_revision or (None if self.base_name else first.base_revision),
            base_fingerprint=self._fingerprint(unchanged),
            base_check=self._check.hexdigest(samples_of(self.base, {**dict.fromkeys(unchanged), **self._shapes})),
            base_first=self._check.first,
            entries=total + sum(self.base[n].numel() for n in unchanged) + dense,
            dense_bytes=max(info.dense_bytes for info in infos),
            dtype=self.settings.dtype,
            factors_dtype=self.settings.dtype,
            settings=self._plain_settings(),
            unchanged=unchanged,
            prefix=first.prefix,
            names={canonical: saved for info in reversed(infos) for canonical, saved in info.names.items()},
        )

    def _fingerprint(self, unchanged: Sequence[str]) -> str:
        """That of the base's tensors which any delta changes or relies on; read only where the deltas' differ."""
        fingerprints = {source.info.base_fingerprint for source in self.sources}
        if len(fingerprints) == 1:
            return self.sources[0].info.base_fingerprint
        return hash_tensors({name: self.base[name] for name in (*self._shapes, *unchanged)})

    def _merged_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a delta prunes, sorted."""
        shapes: dict[str, tuple[int, ...]] = {}
        for source, names in zip(self.sources, self._names, strict=True):
            for source_name, shape in source.contents.table:
                name = names[source_name]
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{name}: {source.task} has the shape {shape}, another delta {shapes[name]}. Bring the "
                        "vocabularies to one size, or prune these deltas again with that tensor carried (--carry)"
                    )
        return dict(sorted(shapes.items()))

    def _check_factors(self) -> None:
        """Refuse factors where the rule is not a sum."""
        factored = [source.task for source in self.sources if source.factored]
        if factored and self.row.rule is not weighted_sum:
            raise ValueError(
                f"{self.settings.method} goes by kept entries, and {', '.join(factored)} hold factors: merge them by "
                "task-arithmetic, or prune these again with a method that keeps entries, such as importance"
            )

    def _check_conflicts(self) -> None:
        """Refuse what has no meaning in a merge: a tensor here pruned and there carried, vocabularies that differ."""
        for source in self.sources:
            both = sorted(set(source.contents.carried) & set(self._shapes))
            if both:
                raise ValueError(
                    f"{source.task} carries {', '.join(both[:5])} as dense tensors, which other deltas prune: prune "
                    "all with the same scope (--scope, --include, --exclude, --carry)"
                )
        first, first_rows = self.sources[0], self.sources[0].contents.new_rows
        for source in self.sources[1:]:
            source_rows = source.contents.new_rows
            for name in sorted({*first_rows, *source_rows}):
                a, b = first_rows.get(name), source_rows.get(name)
                if a is None or b is None or a.shape != b.shape or not torch.equal(a, b):
                    counts = [0 if rows is None else len(rows) for rows in (a, b)]
                    raise ValueError(
                        f"{name}: {first.task} added {counts[0]} rows to the vocabulary, {source.task} {counts[1]}, "
                        "and they are not the same: prune the deltas again with that tensor carried (--carry), which "
                        "keeps it for each task"
                    )

    def _check_patterns(self) -> None:
        """Refuse names and patterns of weights that are of no tensor of the deltas."""
        known = set(self._shapes)
        for source in self.sources:
            known |= {*source.contents.carried, *source.info.reverted, *source.info.unchanged}
        for source, weight in zip(self.sources, self.weights, strict=True):
            if unmatched := weight.unmatched(known):
                raise ValueError(
                    f"the weights of {source.task} name {', '.join(unmatched)}, which is none of its tensors, such as "
                    f"{', '.join(sorted(self._shapes)[:3])}"
                )

    def _stream(self, source: MergeSource, names: Mapping[str, str]) -> Iterator[tuple[str, SparseTensor]]:
        """A source's tensors in the order of the merge; one that was written in another order is read whole."""
        stream, order = source.checked(self.base, names), [names[name] for name, _ in source.contents.table]
        return stream if order == sorted(order) else iter(sorted(stream, key=lambda item: item[0]))

    def _weighted(self, k: int, tensor: SparseTensor, name: str) -> WeightedEntries:
        """The kept entries of a tensor of the k-th delta, trimmed if that is wanted, with their weight."""
        indices, values = tensor.indices, tensor.values
        if self.settings.trim_rate is not None:
            indices, values = trimmed(indices, values, prod(tensor.shape), self.settings.trim_rate)
        return WeightedEntries(indices, values, self.weights[k](name), self.sources[k].info.q)

    def _merged(self, name: str, shape: tuple[int, ...], tensors: Mapping[int, SparseTensor]) -> SparseTensor:
        """One tensor of the merged delta, of the tensors that some deltas have."""
        kept, merged = self._merged_entries(shape, [self._weighted(k, tensor, name) for k, tensor in tensors.items()])
        values = to_dtype(merged, self.settings.dtype, merged, name)
        weighted = [
            tensor.factors.scaled(self.weights[k](name) * self.settings.scale)
            for k, tensor in tensors.items()
            if tensor.factors is not None
        ]
        factors = sum_of_products(weighted, shape)
        result = SparseTensor(shape, kept, values, factors and factors.rounded(self.settings.dtype, name))
        self._check.update(gather_entries(self.base[name], result.changed))
        self._kept += result.stored_numbers
        return result

    def _merged_entries(self, shape: tuple[int, ...], deltas: Sequence[WeightedEntries]) -> tuple[Tensor, Tensor]:
        """Positions and values of the merged kept entries, block by block."""
        numel = prod(shape)
        index_dtype = torch.int32 if numel < 2**31 else torch.int64
        indices, values = GrowingBuffer(index_dtype), GrowingBuffer(torch.float32)
        for start in range(0, numel, _BLOCK):
            size = min(_BLOCK, numel - start)
            block = [_entries_between(entries, start, size) for entries in deltas]
            block_indices, block_values = self.row.rule(block, size, self.settings.scale)
            indices.append(block_indices.to(index_dtype) + start)
            values.append(block_values)
        return indices.tensor(), values.tensor()

    def _plain_settings(self) -> dict[str, object]:
        """The settings as the delta's description has them."""
        plain = [weight.plain() for weight in self.weights]
        settings: dict[str, object] = {
            "tasks": [source.task for source in self.sources],
            "sources": [f"{s.info.method} p={s.info.pruning_rate:g} seed={s.info.seed}" for s in self.sources],
            "weights": "for each tensor" if None in plain else plain,
            "scale": self.settings.scale,
        }
        trim_rate = self.settings.trim_rate
        return settings if trim_rate is None else {**settings, "trim_rate": trim_rate}


def _warn_of_one_seed(sources: Sequence[MergeSource]) -> None:
    """Say which deltas share their random draws, so that their kept entries fall together more often than by chance."""
    drawn: dict[int, list[str]] = {}
    for source in sources:
        method = METHODS.get(source.info.method)
        if source.info.seeded or (method is not None and method.random and not source.factored):
            drawn.setdefault(source.info.seed, []).append(source.task)
    for seed, tasks in drawn.items():
        if len(tasks) > 1:
            warnings.warn(
                f"{', '.join(map(printable, tasks))} were drawn by one seed, {seed}, so that they keep the same "
                "entries or nearly so: prune each with a seed of its own (--seed), as the papers do; such merges "
                "scored 1 to 4 points higher in the benchmark",
                stacklevel=2,
            )


def _entries_between(entries: WeightedEntries, start: int, size: int) -> WeightedEntries:
    """The entries of a block, by their positions in it."""
    bounds = torch.tensor([start, start + size], dtype=entries.indices.dtype)
    first, last = torch.searchsorted(entries.indices, bounds).tolist()
    return entries._replace(indices=entries.indices[first:last] - start, values=entries.values[first:last])


def _merge_carried(carried: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Carried tensors of several tasks as one mapping: what all tasks have alike once, the others for each task.

    Args:
        carried: task to (canonical name to tensor).
    """
    merged: dict[str, Tensor] = {}
    first, *others = carried.values()
    for name in sorted({name for tensors in carried.values() for name in tensors}):
        if name in first and all(name in other and _equal(first[name], other[name]) for other in others):
            merged[name] = first[name]
        else:
            merged |= {f"{task}{TASK_SEPARATOR}{name}": t[name] for task, t in carried.items() if name in t}
    return merged


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
