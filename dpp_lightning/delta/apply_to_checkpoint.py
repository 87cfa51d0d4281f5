"""Applying a delta from files to files, one tensor at a time, so that models may be larger than memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dpp_lightning.delta.contents import DeltaContents, SparseTensor
from dpp_lightning.delta.empty_delta import warning_if_empty
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.match_tensors import check_digest, find_tensors, wrong_base_message
from dpp_lightning.storage.checkpoints import Progress, load_tensors
from dpp_lightning.storage.dense_files import write_dense_files
from dpp_lightning.storage.locate import few_names, local_path
from dpp_lightning.storage.model_configuration import CONFIG
from dpp_lightning.storage.model_folder import dense_side_files
from dpp_lightning.storage.output_folder import DENSE, output_folder
from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter
from dpp_lightning.storage.source_kind import check_model
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.flat_entries import EntriesHash, add_rescaled, gather_entries, samples_of
from dpp_lightning.tensors.name_matching import dense_names
from dpp_lightning.tensors.names import named_tensors

_BLOCK = 1 << 20  # entries of a dense tensor that are in memory at once, few enough for a core's cache
_SHARD_BYTES = 5_000_000_000


def apply_checkpoint(
    base: str | Path,
    delta: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    max_shard_bytes: int = _SHARD_BYTES,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    task: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write base plus delta as a dense folder that ``from_pretrained`` loads; whole or not at all.

    Every tensor has the base's dtype, those carried their own, and ``config.json`` names that of most of them.
    Configuration, tokenizer and generation files and further modules are the delta's where it has its own, else the
    base's, without those that the fine-tuned model does not have. Code of the model's own is not copied; a warning
    names it.

    Args:
        base: as in :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        delta: delta folder or hub id.
        output: a folder that is new, empty, or with ``overwrite`` that of an older dense model; none of the inputs, nor
            inside or around one (:mod:`dpp_lightning.storage.output_folder`).
        force: apply the delta although the base is another one.
        max_shard_bytes: largest file of weights.
        base_revision, delta_revision: of hub ids.
        task: of a merged delta with a head for each task, the one to write.
        overwrite: replace an older dense model in the output folder, at once when the new one is complete.
        progress: called with the bytes that are written, and all of them.

    Raises:
        ValueError: another base, tensors that are missing or of another shape (all in one message), a damaged delta,
            values that are not finite in the base's dtype, or an output that is, holds or lies in an input.
        FileExistsError: the output folder holds something that is not to be replaced.
        OSError: it cannot be written.
    """
    inputs = ("base", base), ("delta", delta)
    with output_folder(output, DENSE, overwrite=overwrite, inputs=inputs) as folder:
        check_model(base, "base", base_revision)
        reader = DeltaReader.open(delta, delta_revision)
        contents, info = warning_if_empty(reader.contents.for_task(task), str(delta)), reader.info
        side_files = dense_side_files(
            base,
            delta,
            base_revision=base_revision,
            delta_revision=delta_revision,
            tasks=info.tasks,
            task=task,
            absent=info.absent_files,
        )
        shapes = contents.shapes_in_base
        named = named_tensors(load_tensors(base, base_revision))
        tensors = find_tensors(shapes, {n.name: n.tensor for n in named}, str(base), info, longer=True)
        base_names = {id(n.owner): n.saved for n in named}
        in_base = {name: base_names[id(tensor)] for name, tensor in tensors.items()}
        entries = list(_entries(contents, tensors, in_base))
        if not (reader.folder / CONFIG).is_file() and task is None:
            _warn_of_heads(contents, {n.name: n.tensor for n in named}, str(base))
        with ShardedWriter(folder, entries, max_shard_bytes) as writer:
            total, done = sum(entry.nbytes for entry in entries), 0
            for block in _dense_blocks(contents, tensors, str(base), force=force):
                writer.write(block)
                done += block.nbytes
                if progress:
                    progress(done, total)
        write_dense_files(side_files, folder, entries)
    return local_path(output)


def _warn_of_heads(contents: DeltaContents, base: Mapping[str, Tensor], where: str) -> None:
    """Say which carried tensors have other rows than the base's, by whose configuration the model will be built."""
    others = [
        f"{name} ({len(tensor)} rows, there {len(base[name])})"
        for name, tensor in contents.carried.items()
        if name in base and tensor.dim() and base[name].dim() and len(tensor) != len(base[name])
    ]
    if others:
        warnings.warn(
            f"the delta has no {CONFIG} of its own, and that of {where} does not fit {few_names(others)}: write the "
            "number of labels there (num_labels of transformers, num_classes of timm), or give it on loading",
            stacklevel=3,
        )


def _base_names(contents: DeltaContents) -> tuple[str, ...]:
    """Names of the tensors that are the base's as they are."""
    info = contents.info()
    return (*info.reverted, *info.unchanged)


def _entries(contents: DeltaContents, tensors: Mapping[str, Tensor], in_base: Mapping[str, str]) -> Iterator[Entry]:
    """What the dense folder holds, in the order of :func:`_dense_blocks`; ``in_base``: names in the base's files."""
    info = contents.info()
    names = dense_names({name: info.saved_name(name) for name in (*tensors, *contents.carried)}, in_base)
    for name, shape in contents.table:
        rows = len(contents.new_rows[name]) if name in contents.new_rows else 0
        yield Entry(names[name], tensors[name].dtype, (shape[0] + rows, *shape[1:]) if rows else shape)
    for name in _base_names(contents):
        yield Entry(names[name], tensors[name].dtype, tuple(tensors[name].shape))
    for name, tensor in contents.carried.items():
        yield Entry(names[name], tensor.dtype, tuple(tensor.shape))


def _dense_blocks(
    contents: DeltaContents, tensors: Mapping[str, Tensor], base_name: str, *, force: bool
) -> Iterator[Tensor]:
    """Flat blocks of the fine-tuned tensors, in order."""
    info, check = contents.info(), EntriesHash()
    for name, sparse in contents.tensors():
        kept = gather_entries(tensors[name], sparse.changed)
        check.update(kept)
        if not force and check.first not in ("", info.base_first):
            raise ValueError(wrong_base_message(base_name, check.first, info))
        yield from _overwritten_blocks(name, tensors[name], sparse, add_rescaled(kept, *sparse.change(info.q)))
        if name in contents.new_rows:
            yield contents.new_rows[name].to(tensors[name].dtype).reshape(-1)
    if not force:
        check_digest(check, info, samples_of(tensors, contents.shapes_in_base), base_name)
    for name in _base_names(contents):
        yield from tensors[name].reshape(-1).split(_BLOCK)
    for tensor in contents.carried.values():
        yield from tensor.reshape(-1).split(_BLOCK)


def _overwritten_blocks(name: str, base: Tensor, sparse: SparseTensor, values: Tensor) -> Iterator[Tensor]:
    """The base's entries with the kept ones replaced by ``values``, in flat blocks, each in the place of the last."""
    if not is_finite(values):
        raise ValueError(f"{name}: theta_0 + value / q is not finite in {base.dtype}")
    numel = torch.Size(sparse.shape).numel()
    if sparse.factors is not None:  # every entry is overwritten
        yield from values.split(_BLOCK)
        return
    flat = base.reshape(-1)[:numel]
    cuts = torch.searchsorted(sparse.indices.long(), torch.arange(0, numel + _BLOCK, _BLOCK)).tolist()
    room = torch.empty(min(_BLOCK, numel), dtype=base.dtype)
    for number, start in enumerate(range(0, numel, _BLOCK)):
        old, first, last = flat[start : start + _BLOCK], cuts[number], cuts[number + 1]
        block = room[: len(old)].copy_(old)
        yield block.index_copy_(0, sparse.indices[first:last].long() - start, values[first:last])
