"""A trainer's checkpoint to a folder that plain ``from_pretrained`` loads, a block of one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dpp_lightning.tensors.hf_architecture import Architecture
from dpp_lightning.export.hf_file_names import FileShapes, file_tensors
from dpp_lightning.export.lora_merge import Adapter, merged_blocks
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.storage.atomic_write import atomic_folder
from dpp_lightning.storage.checkpoints import Progress
from dpp_lightning.storage.model_folder import copy_files
from dpp_lightning.storage.safetensors_writer import Entry, ShardedWriter
from dpp_lightning.storage.stored_tensor import StoredTensor


@dataclass(frozen=True)
class Export:
    """A checkpoint understood, ready to be written.

    Attributes:
        architecture: the model's class, configuration and names.
        tensors: the model's name to the tensor on disk, in order, each tied one once.
        file_shapes: the model's name to names and shapes in the files; several where they hold the tensor in pieces.
        adapters: the model's name to the adapter to merge.
        dtype: the floating-point tensors are cast to it; None leaves them as they are.
        source: folder or hub id of configuration and tokenizer.
        files: what is copied from there.
        notes: what was left out or changed, for the user.
    """

    architecture: Architecture
    tensors: dict[str, StoredTensor]
    file_shapes: dict[str, FileShapes]
    adapters: dict[str, Adapter]
    dtype: torch.dtype | None
    source: str
    files: dict[str, Path]
    notes: tuple[str, ...]

    @property
    def entries(self) -> list[Entry]:
        """What the folder's files of weights hold."""
        return [
            Entry(name, self._dtype(tensor), shape)
            for model_name, tensor in self.tensors.items()
            for name, shape in self.file_shapes[model_name].items()
        ]

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
        """The entries' bytes, in order: blocks of a tensor, but the whole of one that the files hold in pieces."""
        for name, tensor in self.tensors.items():
            blocks = (self._cast(name, block, self._dtype(tensor)) for block in self._merged(name, tensor))
            if [*self.file_shapes[name].values()] == [tensor.shape]:
                yield from blocks
            else:
                pieces = file_tensors(self.architecture.model, name, torch.cat([*blocks]).reshape(tensor.shape))
                yield from (pieces[file_name].reshape(-1) for file_name in self.file_shapes[name])

    def _merged(self, name: str, tensor: StoredTensor) -> Iterator[Tensor]:
        if name not in self.adapters:
            return tensor.blocks()
        return merged_blocks(tensor, self.adapters[name], transposed=name in self.architecture.transposed)

    def _cast(self, name: str, block: Tensor, dtype: torch.dtype) -> Tensor:
        cast = block.to(dtype)
        if cast.dtype != block.dtype and not torch.isfinite(cast).all() and torch.isfinite(block).all():
            raise ValueError(f"{name} has values too large for {dtype}; take --dtype bfloat16 or leave it out")
        return cast


def export_checkpoint(
    export: Export, output: str | Path, *, max_shard_bytes: int = 5_000_000_000, progress: Progress | None = None
) -> Path:
    """Write the dense folder, whole or not at all.

    Args:
        export: of :func:`dpp_lightning.export.plan.plan_export`.
        output: a folder that is new or empty.
        max_shard_bytes: largest file of weights.
        progress: called with the bytes written, and with all of them.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError, OSError: as :meth:`Export.write`.
    """
    with atomic_folder(Path(output), empty=True) as folder:
        export.write(folder, max_shard_bytes, progress)
    return Path(output)


def export_delta(
    export: Export,
    base: str | Path,
    output: str | Path,
    spec: PruningSpec,
    *,
    base_revision: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Prune against a base and write the delta folder, whole or not at all.

    The dense model lies beside the output for the time, so that its names and files are those of the base's layout.

    Args:
        export: of :func:`dpp_lightning.export.plan.plan_export`.
        output: a folder that is new or empty.
        base, spec, base_revision: as :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        progress: called with the bytes of both models that are pruned, and all of them.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError, OSError: as :meth:`Export.write` and
        :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
    """
    output = Path(output)
    with atomic_folder(output, empty=True) as folder, TemporaryDirectory(prefix=".dense.", dir=output.parent) as dense:
        export.write(Path(dense), 1 << 62)
        prune_checkpoint(base, dense, folder, spec, base_revision=base_revision, progress=progress)
    return output
