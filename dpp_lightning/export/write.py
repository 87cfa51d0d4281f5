"""A trainer's checkpoint to a folder that plain ``from_pretrained`` loads, a block of one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpp_lightning.export.lora_merge import Adapter, merged_blocks
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage.atomic_write import scratch_folder
from dpp_lightning.storage.checkpoints import Progress
from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.model_folder import copy_files
from dpp_lightning.storage.output_folder import DELTA, DENSE, Inputs, output_folder
from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter
from dpp_lightning.storage.same_place import real_path
from dpp_lightning.storage.stored_tensor import StoredTensor
from dpp_lightning.tensors.finite import is_finite
from dpp_lightning.tensors.hf_architecture import Architecture
from dpp_lightning.tensors.hf_layout import FilePlace, Layout


@dataclass(frozen=True)
class Export:
    """A checkpoint understood, ready to be written.

    Attributes:
        architecture: the model's class, configuration and names.
        tensors: the model's name to the tensor on disk, in order, each tied one once.
        layout: name in the files to where that tensor lies in the model.
        adapters: the model's name to the adapter to merge.
        dtype: the floating-point tensors are cast to it; None leaves them as they are.
        checkpoint: where it lies.
        source: folder or hub id of configuration and tokenizer.
        files: what is copied from there.
        notes: what was left out or changed, for the user.
    """

    architecture: Architecture
    tensors: dict[str, StoredTensor]
    layout: Layout
    adapters: dict[str, Adapter]
    dtype: torch.dtype | None
    checkpoint: Path
    source: str
    files: dict[str, Path]
    notes: tuple[str, ...]

    @property
    def inputs(self) -> Inputs:
        """What is read while the export is written."""
        return ("checkpoint", self.checkpoint), ("the configuration's source", self.source)

    @property
    def entries(self) -> list[Entry]:
        """What the folder's files of weights hold."""
        return [
            Entry(name, self._dtype(self.tensors[place.source]), self._shape(place)) for name, place in self._in_order()
        ]

    def _in_order(self) -> list[tuple[str, FilePlace]]:
        """The files' tensors, those of one of the model's after one another."""
        order = {name: index for index, name in enumerate(self.tensors)}
        return sorted(self.layout.items(), key=lambda item: (order[item[1].source], item[1].offset))

    def _shape(self, place: FilePlace) -> tuple[int, ...]:
        shapes = [self.tensors[p.source].shape if p.size is None else p.size for p in place.pieces]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if place.more else shapes[0]

    def write(self, folder: Path, max_shard_bytes: int, progress: Progress | None = None) -> None:
        """Write weights, configuration and tokenizer into a folder that is there.

        Raises:
            ValueError: values that are not finite in ``dtype``, or a piece of the checkpoint that is damaged.
            OSError: it cannot be written.
        """
        entries = self.entries
        total, done = sum(entry.nbytes for entry in entries), 0
        with ShardedWriter(folder, entries, max_shard_bytes) as writer:
            for block in self._blocks():
                writer.write(block)
                done += block.nbytes
                if progress:
                    progress(done, total)
        copy_files(self.files, folder)
        self.architecture.config.save_pretrained(folder)

    def _dtype(self, tensor: StoredTensor) -> torch.dtype:
        return self.dtype if self.dtype and tensor.dtype.is_floating_point else tensor.dtype

    def _blocks(self) -> Iterator[Tensor]:
        """The entries' bytes, in order: blocks of a tensor, but the whole of one that the files hold in parts."""
        name, whole = "", torch.empty(0)
        for piece in (piece for _, place in self._in_order() for piece in place.pieces):
            if piece.size is None:
                yield from self._cast_blocks(piece.source)
                continue
            if name != piece.source:
                name = piece.source
                whole = torch.cat([*self._cast_blocks(name)]).reshape(self.tensors[name].shape)
            yield piece.of(whole).reshape(-1)

    def _cast_blocks(self, name: str) -> Iterator[Tensor]:
        """Flat blocks of one of the model's tensors, adapters merged, in the dtype that is written."""
        tensor = self.tensors[name]
        return (self._cast(name, block, self._dtype(tensor)) for block in self._merged(name, tensor))

    def _merged(self, name: str, tensor: StoredTensor) -> Iterator[Tensor]:
        if name not in self.adapters:
            return tensor.blocks()
        return merged_blocks(tensor, self.adapters[name], transposed=name in self.architecture.transposed)

    def _cast(self, name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        cast = block.to(dtype)
        if cast.dtype != block.dtype and not is_finite(cast) and is_finite(block):
            raise ValueError(f"{name} has values too large for {dtype}; take --dtype bfloat16 or leave it out")
        return cast


def export_checkpoint(
    export: Export,
    output: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the dense folder, whole or not at all.

    Args:
        export: of :func:`dpp_lightning.export.plan.plan_export`.
        output: a folder that is new, empty, or with ``overwrite`` that of an older dense model; none of the inputs, nor
            inside or around one (:mod:`dpp_lightning.storage.output_folder`).
        max_shard_bytes: largest file of weights.
        overwrite: replace an older dense model in the output folder, at once when the new one is complete.
        progress: called with the bytes written, and with all of them.

    Raises:
        FileExistsError: the output folder holds something that is not to be replaced.
        ValueError: the output is, holds or lies in an input; or as :meth:`Export.write`.
        OSError: as :meth:`Export.write`.
    """
    with output_folder(output, DENSE, overwrite=overwrite, inputs=export.inputs) as folder:
        export.write(folder, max_shard_bytes, progress)
    return local_path(output)


def export_delta(
    export: Export,
    base: str | Path,
    output: str | Path,
    spec: PruningSpec,
    *,
    base_revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Prune against a base and write the delta folder, whole or not at all.

    The dense model lies beside the output for the time, so that its names and files are those of the base's layout.

    Args:
        export: of :func:`dpp_lightning.export.plan.plan_export`.
        output: folder of the delta: new, empty, or with ``overwrite`` an older delta's; none of the inputs, nor inside
            or around one (:mod:`dpp_lightning.storage.output_folder`).
        base, spec, base_revision: as :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        overwrite: replace an older delta in the output folder, at once when the new one is complete.
        progress: called with the bytes of both models that are pruned, and all of them.

    Raises:
        FileExistsError: the output folder holds something that is not to be replaced.
        ValueError, OSError: as :meth:`Export.write` and
        :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
    """
    inputs = [*export.inputs, ("base", base)]
    with (
        output_folder(output, DELTA, overwrite=overwrite, inputs=inputs) as folder,
        scratch_folder(real_path(output)) as dense,
    ):
        export.write(dense, 1 << 62)
        prune_checkpoint(base, dense, folder, spec, base_revision=base_revision, progress=progress)
    return local_path(output)
