"""Merging: several pruned deltas of one base become one delta, tensor by tensor, on their kept entries alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dpp_lightning.delta.config_file import CONFIG_FILE
from dpp_lightning.delta.folder import write_files
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.merging.merger import Merger
from dpp_lightning.merging.sources import MergeSource
from dpp_lightning.merging.weights import Weights
from dpp_lightning.storage.atomic_write import atomic_folder
from dpp_lightning.storage.checkpoints import Progress, load_tensors
from dpp_lightning.storage.checkpoints import Weights as BaseWeights
from dpp_lightning.storage.model_folder import merged_side_files
from dpp_lightning.tensors.names import canonical_tensors


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
        dtype: how the kept values are held; default float32.

    Returns:
        One delta. Carried tensors that differ between the deltas, such as heads, are in it for each task:
        ``merge(...).for_task("sst2")``.

    Raises:
        ValueError: deltas of another base (all are named), of tensors that do not fit together, unknown method, weights
            that do not fit, or settings out of range.
        FileNotFoundError: no such delta.
    """
    tensors = canonical_tensors(load_tensors(base) if isinstance(base, str | Path) else base)
    name = str(base) if isinstance(base, str | Path) else None
    listed = list(deltas.values()) if isinstance(deltas, Mapping) else list(deltas)
    names = tasks or (list(deltas) if isinstance(deltas, Mapping) else None)
    opened = [DeltaReader.open(d) if isinstance(d, str | Path) else d for d in listed]
    merger = Merger(tensors, name, MergeSource.all(opened, names), method, weights, scale, trim_rate, dtype)
    parts = dict(merger.parts())
    carried = {n: t.detach().clone() for n, t in merger.carried.items()}
    return SparseDelta(parts, carried, merger.info(), {n: t.detach().clone() for n, t in merger.new_rows.items()})


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
    progress: Progress | None = None,
) -> Path:
    """Merge delta folders into one, a tensor at a time; whole or not at all.

    Configuration and tokenizer files that lie beside the deltas go along: under their own name where all have the same,
    else as ``TASK.config.json``.

    Args:
        base: as in :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        deltas: folders or hub ids.
        output: folder of the merged delta; made, or an older delta replaced.
        method, weights, tasks, scale, trim_rate, dtype: as in :func:`merge`.
        base_revision: of a hub id.
        progress: told the bytes of the merged tensors that are done, and all of them.

    Raises:
        ValueError: as :func:`merge`.
        FileNotFoundError: no such delta or base.
        FileExistsError: the output folder holds something other than a delta.
        OSError: it cannot be written.
    """
    with atomic_folder(Path(output), replaces=CONFIG_FILE) as folder:
        sources = MergeSource.all([DeltaReader.open(delta) for delta in deltas], tasks)
        tensors = canonical_tensors(load_tensors(base, base_revision))
        merger = Merger(tensors, str(base), sources, method, weights, scale, trim_rate, dtype, base_revision)
        write_files(
            folder,
            merger.parts(progress),
            merger.carried,
            merger.new_rows,
            merger.info,
            seeded=merger.seeded,
            dtype=dtype,
            scores={},
            side_files=merged_side_files({s.task: s.folder for s in sources if s.folder is not None}),
        )
    return Path(output)
