"""A delta folder, opened: its dense tensors mapped, its kept entries read tensor by tensor or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from operator import itemgetter
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from dpp_lightning.delta.coding.chunk_stream import ChunkReader
from dpp_lightning.delta.config_file import CONFIG_FILE, check_name, read_config
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.folder import CARRIED, KEPT, MODEL_FILE, ROWS
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.storage.model_folder import local_folder


class DeltaReader:
    """The checked contents of a delta's two files.

    Args:
        blob: the tensors of ``delta_model.safetensors``.
        config: the bytes of ``delta_config.json``.
        checksum: xxh3-128 of the model file as it was found.
        folder: where they lie on this machine.

    Attributes:
        info: the delta's description.
        carried, new_rows: canonical name to dense tensor.
        chunks: reads the kept entries.

    Raises:
        ValueError: a file that is damaged, hostile, or of another format.
    """

    def __init__(self, blob: Mapping[str, Tensor], config: bytes, checksum: str, folder: Path = Path()) -> None:
        self.folder = folder
        self.info, table, seeded, stated = read_config(config)
        if checksum != stated:
            raise ValueError(
                f"{MODEL_FILE} does not have the checksum that {CONFIG_FILE} states: one of them is damaged"
            )
        kept = blob.get(KEPT)
        if kept is None or kept.dtype != torch.uint8 or kept.dim() != 1:
            raise ValueError(f"{MODEL_FILE} holds no one-dimensional blob {KEPT!r} of bytes")
        self.carried = {
            n[len(CARRIED) :]: t for n, t in sorted(blob.items(), key=itemgetter(0)) if n.startswith(CARRIED)
        }
        self.new_rows = {n[len(ROWS) :]: t for n, t in sorted(blob.items(), key=itemgetter(0)) if n.startswith(ROWS)}
        others = [name for name in blob if name != KEPT and not name.startswith((CARRIED, ROWS))]
        if others:
            raise ValueError(f"{MODEL_FILE} holds {others[:5]}, which no delta has")
        self._check_dense(dict(table))
        self.chunks = ChunkReader(kept.numpy(), table, self.info, seeded=seeded)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> DeltaReader:
        """A local folder or a hub id.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: as the class.
        """
        folder = local_folder(source, revision, [MODEL_FILE, CONFIG_FILE, "*.json", "*.model", "*.txt", "*.jinja"])
        missing = [name for name in (MODEL_FILE, CONFIG_FILE) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} is no delta folder: it lacks {' and '.join(missing)}")
        model = folder / MODEL_FILE
        return cls(load_tensors(model), (folder / CONFIG_FILE).read_bytes(), _file_checksum(model), folder)

    def tensors(self) -> Iterator[tuple[str, SparseTensor]]:
        """Canonical name and kept entries of one pruned tensor after the other.

        Raises:
            ValueError: chunks that are damaged or hostile.
        """
        return self.chunks.tensors()

    def delta(self) -> SparseDelta:
        """All of it in memory; errors as :meth:`tensors`."""
        tensors = dict(self.tensors())
        carried = {name: tensor.clone() for name, tensor in self.carried.items()}
        return SparseDelta(tensors, carried, self.info, {n: t.clone() for n, t in self.new_rows.items()})

    def _check_dense(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in (*self.carried, *self.new_rows):
            check_name(name)
        both = sorted(set(self.carried) & set(shapes))
        if both:
            raise ValueError(f"{MODEL_FILE} holds tensors both pruned and carried: {both[:5]}")
        for name, rows in self.new_rows.items():
            shape = shapes.get(name, ())
            if not shape or tuple(rows.shape[1:]) != shape[1:] or rows.dim() == 0:
                raise ValueError(f"{MODEL_FILE}: new rows {list(rows.shape)} do not continue {name!r}, {list(shape)}")


def decode(model: bytes, config: bytes) -> SparseDelta:
    """The delta in the bytes of the two files, as :func:`dpp_lightning.delta.folder.encode` makes them.

    Raises:
        ValueError: anything that is not as encode writes it.
    """
    try:
        blob = load_bytes(model)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{MODEL_FILE} is not a readable safetensors file: {error}") from error
    return DeltaReader(blob, config, xxhash.xxh3_128_hexdigest(model)).delta()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
            return xxhash.xxh3_128_hexdigest(mapped)
