"""The delta folder: ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card, written and read.

``delta_model.safetensors`` holds the blob ``kept`` (chunks, see :mod:`dpp_lightning.delta.coding.chunk`) and the dense
tensors
``carried.NAME`` and ``rows.NAME``. Both ways go tensor by tensor, so a delta may be larger than memory. Everything read
from a file is checked before use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

import torch
import xxhash
from torch import Tensor

from dpp_lightning.delta.coding.chunk_stream import ChunkWriter
from dpp_lightning.delta.config_file import CONFIG_FILE, Table, write_config
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor
from dpp_lightning.delta.model_card import model_card
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.storage.atomic_write import atomic_folder
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.model_folder import copy_files
from dpp_lightning.storage.safetensors_writer import Entry, SafetensorsWriter
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, check_dtype, to_dtype

MODEL_FILE, CARD_FILE = "delta_model.safetensors", "README.md"
KEPT, CARRIED, ROWS = "kept", "carried.", "rows."
_SPILL = 1 << 26  # bytes of chunks that are held in memory before they go to a temporary file
_COPY = 1 << 22

Parts = Iterable[tuple[str, SparseTensor]]


def encode(
    delta: SparseDelta, dtype: str | torch.dtype | None = None, positions: str | None = None
) -> tuple[bytes, bytes]:
    """A delta as the bytes of its two files.

    Args:
        delta: the delta.
        dtype: how the file holds the kept values, default as they were drawn.
        positions: ``seed`` or ``index``; default ``seed`` where the selection is seeded.

    Raises:
        ValueError: unknown dtype or coding, a coding that the selection does not allow, values that overflow.
    """
    info, parts, seeded = _as_saved(delta, dtype, positions)
    file = BytesIO()
    table, checksum = write_model(file, parts, delta.carried, delta.new_rows, seeded=seeded, dtype=info.dtype)
    return file.getvalue(), write_config(info, table, seeded=seeded, model_checksum=checksum)


def write_folder(
    delta: SparseDelta,
    folder: Path,
    *,
    dtype: str | torch.dtype | None,
    positions: str | None,
    scores: Mapping[str, float] | None,
    side_files: Mapping[str, Path | bytes],
) -> Path:
    """See :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.save_pretrained`."""
    info, parts, seeded = _as_saved(delta, dtype, positions)
    with atomic_folder(folder, replaces=CONFIG_FILE) as temporary:
        write_files(
            temporary,
            parts,
            delta.carried,
            delta.new_rows,
            lambda: info,
            seeded=seeded,
            dtype=info.dtype,
            scores=scores or {},
            side_files=side_files,
        )
    return folder


def write_files(
    folder: Path,
    parts: Parts,
    carried: Mapping[str, Tensor],
    new_rows: Mapping[str, Tensor],
    info: Callable[[], DeltaInfo],
    *,
    seeded: bool,
    dtype: str | None,
    scores: Mapping[str, float],
    side_files: Mapping[str, Path | bytes],
) -> None:
    """Write a delta's files into a folder, the kept entries one tensor at a time.

    Args:
        folder: exists; the caller makes it appear whole.
        parts: canonical name and kept entries of every pruned tensor.
        carried, new_rows: dense tensors, possibly mapped from a file.
        info: asked for when all parts have been read.
        seeded: store no positions.
        dtype: as ``DeltaInfo.dtype``.
        scores, side_files: as for :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.save_pretrained`.
    """
    copy_files(side_files, folder)
    with (folder / MODEL_FILE).open("wb") as file:
        table, checksum = write_model(file, parts, carried, new_rows, seeded=seeded, dtype=dtype)
    description = info()
    (folder / CONFIG_FILE).write_bytes(write_config(description, table, seeded=seeded, model_checksum=checksum))
    write_card(folder, description, scores, {**carried, **new_rows})


def write_card(folder: Path, info: DeltaInfo, scores: Mapping[str, float], dense: Mapping[str, Tensor]) -> None:
    """Write the card of a folder that has its two files; ``dense`` are the carried tensors and new rows."""
    card = model_card(info, delta_bytes(folder), scores, len(dense), total_bytes(dense))
    (folder / CARD_FILE).write_bytes(card.encode())


def delta_bytes(folder: Path) -> int:
    """Bytes of the model and config file of a delta folder."""
    return sum((folder / name).stat().st_size for name in (MODEL_FILE, CONFIG_FILE))


def further_bytes(folder: Path) -> int:
    """Bytes of what lies in a delta folder beside the delta and its card: configuration and tokenizer files."""
    own = {MODEL_FILE, CONFIG_FILE, CARD_FILE}
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name not in own)


def write_model(
    file: BinaryIO,
    parts: Parts,
    carried: Mapping[str, Tensor],
    new_rows: Mapping[str, Tensor],
    *,
    seeded: bool,
    dtype: str | None,
) -> tuple[Table, str]:
    """Write ``delta_model.safetensors``; returns names and shapes in the order of the chunks, and the checksum."""
    place = str(Path(file.name).parent) if isinstance(getattr(file, "name", None), str) else None
    with SpooledTemporaryFile(max_size=_SPILL, dir=place) as spill:
        writer = ChunkWriter(cast(BinaryIO, spill), seeded=seeded, dtype=dtype)
        for name, part in parts:
            writer.add(name, part)
        writer.close()
        size = spill.tell()
        spill.seek(0)
        dense = {CARRIED + n: t for n, t in carried.items()} | {ROWS + n: t for n, t in new_rows.items()}
        order = sorted(dense, key=lambda name: (-dense[name].element_size(), name))  # keeps all of them aligned
        entries = [Entry(name, dense[name].dtype, tuple(dense[name].shape)) for name in order]
        hashed = _Hashed(file)
        out = SafetensorsWriter(cast(BinaryIO, hashed), [*entries, Entry(KEPT, torch.uint8, (size,))])
        for name in order:
            out.write(dense[name])
        while block := spill.read(_COPY):
            out.write(block)
        out.close()
    return writer.table, hashed.digest.hexdigest()


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _as_saved(
    delta: SparseDelta, dtype: str | torch.dtype | None, positions: str | None
) -> tuple[DeltaInfo, Parts, bool]:
    """The delta's description and kept entries as the file will hold them, and whether positions are left out."""
    info = delta.info
    coding = positions or ("seed" if info.seeded else "index")
    if coding not in ("seed", "index") or (coding == "seed" and not info.seeded):
        allowed = "'seed' or 'index'" if info.seeded else "'index' (this selection follows from no seed)"
        raise ValueError(f"positions must be {allowed}, got {positions!r}")
    name = info.dtype if dtype is None else str(dtype).removeprefix("torch.")
    check_dtype(name)
    if info.method in METHODS:
        METHODS[info.method].check_dtype(info.method, name)
    parts: Parts = delta.tensors.items()
    held = torch.float32 if name in INTEGERS and name == info.dtype else FLOATS.get(name or "")
    if name is not None and any(t.values.dtype != held for t in delta.tensors.values()):
        parts = ((n, replace(t, values=to_dtype(t.values, name, t.values, n))) for n, t in delta.tensors.items())
    return replace(info, dtype=name), parts, coding == "seed"
