"""``delta_model.safetensors`` written: the blobs ``table``, ``factors`` and ``kept``, and the dense tensors."""

from __future__ import annotations

from io import SEEK_END, BytesIO
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, BinaryIO, cast

import torch
import xxhash

from dpp_lightning.delta.coding.factor_stream import FactorWriter
from dpp_lightning.delta.coding.limits import least_bytes
from dpp_lightning.delta.contents import DeltaContents
from dpp_lightning.delta.kept_blob import write_kept
from dpp_lightning.delta.promise import check_promise
from dpp_lightning.delta.table_blob import TensorTable, write_table
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.safetensors_writer import Entry, SafetensorsWriter

TABLE, FACTORS, KEPT = BLOBS = ("table", "factors", "kept")
CARRIED, ROWS = "carried.", "rows."
_SPILL_BYTES = 1 << 26  # of chunks that are held in memory before they go to a temporary file
_COPY_BYTES = 1 << 22


def write_model(
    file: BinaryIO,
    contents: DeltaContents,
    *,
    seeded: bool,
    dtype: str | None,
    factors_dtype: str | None,
    rest: bool = False,
    seed_only: bool = False,
) -> tuple[TensorTable, str, bool]:
    """Write ``delta_model.safetensors`` in bounded memory.

    Args:
        file: open for writing bytes.
        contents: its description is asked for when all tensors have been read.
        seeded: store no positions, as they follow from the seed, if a reader would draw them.
        dtype, factors_dtype, rest: as of ``DeltaInfo``.
        seed_only: refuse to store positions that follow from the seed.

    Returns:
        The table, the checksum of the file, and whether no positions are stored.

    Raises:
        ValueError: names or numbers of tensors that no reader would take, or factors that do not fit their tensors.
        OSError: it cannot be written.
    """
    spill_folder = str(Path(file.name).parent) if isinstance(getattr(file, "name", None), str) else None
    with (
        SpooledTemporaryFile(max_size=_SPILL_BYTES, dir=spill_folder) as kept,
        SpooledTemporaryFile(max_size=_SPILL_BYTES, dir=spill_folder) as factors,
    ):
        with FactorWriter(cast(BinaryIO, factors), factors_dtype) as products:
            names, seeded = write_kept(
                cast(BinaryIO, kept), products, contents, seeded=seeded, dtype=dtype, rest=rest, seed_only=seed_only
            )
        info = contents.info()
        table = TensorTable(names, products.ranks, info.reverted, info.unchanged, info.names)
        dense = {CARRIED + n: t for n, t in contents.carried.items()} | {
            ROWS + n: t for n, t in contents.new_rows.items()
        }
        beside = total_bytes(dense) + sum(blob.seek(0, SEEK_END) for blob in (kept, factors))
        blobs: dict[str, IO[bytes]] = {TABLE: BytesIO(write_table(table, least_bytes(len(names)) - beside))}
        if table.has_factors:
            blobs[FACTORS] = factors
        blobs[KEPT] = kept
        order = sorted(dense, key=lambda name: (-dense[name].element_size(), name))  # keeps all of them aligned
        entries = [Entry(name, dense[name].dtype, tuple(dense[name].shape)) for name in order]
        entries += [Entry(name, torch.uint8, (blob.seek(0, SEEK_END),)) for name, blob in blobs.items()]
        check_promise(info.entries, table.tensors, dense.values(), sum(entry.nbytes for entry in entries))
        hashed = _HashedFile(file)
        writer = SafetensorsWriter(cast(BinaryIO, hashed), entries)
        for name in order:
            writer.write(dense[name])
        for blob in blobs.values():
            blob.seek(0)
            while block := blob.read(_COPY_BYTES):
                writer.write(block)
        writer.close()
    return table, hashed.digest.hexdigest(), seeded


class _HashedFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
