"""Applying a delta from files to files, one tensor at a time, so that models may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dpp_lightning.delta.contents import DeltaInfo, SparseTensor, wrong_base
from dpp_lightning.delta.match_tensors import matched
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.delta.task_heads import of_task, task_names
from dpp_lightning.storage.atomic_write import atomic_folder
from dpp_lightning.storage.checkpoints import Progress, load_tensors
from dpp_lightning.storage.model_folder import copy_files, dense_side_files
from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter
from dpp_lightning.tensors.flat_entries import EntriesHash, add_rescaled, gather_entries
from dpp_lightning.tensors.names import canonical_tensors

_BLOCK = 1 << 24  # entries of a dense tensor that are in memory at once
_SHARD = 5_000_000_000


def apply_checkpoint(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    max_shard_bytes: int = _SHARD,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    task: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write base plus delta as a dense folder that ``from_pretrained`` loads; whole or not at all.

    Every tensor has the base's dtype, those carried their own. Configuration, tokenizer and generation files are the
    base's, or the delta's where it has its own.

    Args:
        base: as in :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        delta: delta folder or hub id.
        output: a folder that is new or empty.
        force: apply the delta although the base is another one.
        max_shard_bytes: largest file of weights.
        base_revision, delta_revision: of hub ids.
        task: of a merged delta with a head for each task, the one to write.
        progress: told the bytes written, and all of them.

    Raises:
        ValueError: another base, tensors that are missing or of another shape (all in one message), a damaged delta.
        FileExistsError: the output folder is not empty.
        OSError: it cannot be written.
    """
    with atomic_folder(Path(output), empty=True) as folder:
        reader = DeltaReader.open(delta, delta_revision)
        tasks = task_names(reader.info)
        reader.info, reader.carried = of_task(reader.info, reader.carried, task)
        shapes: dict[str, tuple[int, ...] | None] = dict(reader.chunks.table)
        shapes |= dict.fromkeys((*reader.info.reverted, *reader.info.unchanged))
        base_tensors = canonical_tensors(load_tensors(base, base_revision))
        tensors = matched(shapes, base_tensors, str(base), reader.info, longer=True)
        entries = list(_entries(reader, tensors))
        with ShardedWriter(folder, entries, max_shard_bytes) as writer:
            total, done = sum(entry.nbytes for entry in entries), 0
            for piece in _dense(reader, tensors, str(base), force=force):
                writer.write(piece)
                done += piece.numel() * piece.element_size()
                if progress:
                    progress(done, total)
        revisions = {"base_revision": base_revision, "delta_revision": delta_revision}
        copy_files(dense_side_files(base, delta, **revisions, tasks=tasks, task=task), folder)
    return Path(output)


def _entries(reader: DeltaReader, tensors: Mapping[str, Tensor]) -> Iterator[Entry]:
    """What the dense folder holds, in the order of :func:`_dense`."""
    info: DeltaInfo = reader.info
    for name, shape in reader.chunks.table:
        rows = len(reader.new_rows[name]) if name in reader.new_rows else 0
        whole = (shape[0] + rows, *shape[1:]) if rows else shape
        yield Entry(info.saved_name(name), tensors[name].dtype, whole)
    for name in (*info.reverted, *info.unchanged):
        yield Entry(info.saved_name(name), tensors[name].dtype, tuple(tensors[name].shape))
    for name, tensor in reader.carried.items():
        yield Entry(info.saved_name(name), tensor.dtype, tuple(tensor.shape))


def _dense(reader: DeltaReader, tensors: Mapping[str, Tensor], base_name: str, *, force: bool) -> Iterator[Tensor]:
    """Flat pieces of the fine-tuned tensors, in order."""
    info, check = reader.info, EntriesHash()
    for name, part in reader.tensors():
        kept = gather_entries(tensors[name], part.indices)
        check.update(kept)
        if not force and check.first not in ("", info.base_first):
            raise ValueError(wrong_base(base_name, check.first, info))
        yield from _overwritten(name, tensors[name], part, add_rescaled(kept, part.values, info.q))
        if name in reader.new_rows:
            yield reader.new_rows[name].to(tensors[name].dtype).reshape(-1)
    if not force and check.hexdigest() != info.base_check:
        raise ValueError(wrong_base(base_name, check.hexdigest(), info))
    for name in (*info.reverted, *info.unchanged):
        yield from tensors[name].reshape(-1).split(_BLOCK)
    for tensor in reader.carried.values():
        yield from tensor.reshape(-1).split(_BLOCK)


def _overwritten(name: str, base: Tensor, part: SparseTensor, values: Tensor) -> Iterator[Tensor]:
    """The base's entries with the kept ones replaced, in flat blocks."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name}: theta_0 + value / q is not finite in {base.dtype}")
    numel = torch.Size(part.shape).numel()
    flat = base.reshape(-1)[:numel]
    cuts = torch.searchsorted(part.indices.long(), torch.arange(0, numel + _BLOCK, _BLOCK)).tolist()
    for place, start in enumerate(range(0, numel, _BLOCK)):
        block, a, b = flat[start : start + _BLOCK].clone(), cuts[place], cuts[place + 1]
        yield block.index_copy_(0, part.indices[a:b].long() - start, values[a:b])
