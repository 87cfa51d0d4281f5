"""The delta folder: ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card, written and read.

``delta_model.safetensors`` holds the blobs ``table`` (:mod:`dpp_lightning.delta.table_blob`), ``kept`` (chunks, see
:mod:`dpp_lightning.delta.coding.chunk`) and, where a tensor has factors, ``factors``, and the dense tensors
``carried.NAME`` and ``rows.NAME``. Both ways go tensor by tensor, so a delta may be larger than memory.
Everything read from a file is checked before use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from torch import Tensor

from dpp_lightning.delta.coding.chunk_stream import ChunkReader
from dpp_lightning.delta.coding.factor_stream import FactorReader
from dpp_lightning.delta.config_file import CONFIG_FILE, read_config, with_q, write_config
from dpp_lightning.delta.contents import DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.model_card import card_text
from dpp_lightning.delta.model_file import BLOBS, CARRIED, FACTORS, KEPT, ROWS, TABLE, write_model
from dpp_lightning.delta.promise import check_promise
from dpp_lightning.delta.table_blob import TensorTable, read_table
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.storage.checkpoints import load_tensors, total_bytes
from dpp_lightning.storage.locate import local_folder, local_path
from dpp_lightning.storage.model_folder import SIDE_PATTERNS, copy_files, module_weights
from dpp_lightning.storage.output_folder import DELTA, output_folder
from dpp_lightning.storage.safe_text import check_name
from dpp_lightning.storage.source_kind import check_delta
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, check_dtype, to_dtype

MODEL_FILE, CARD_FILE = "delta_model.safetensors", "README.md"


def save_folder(
    contents: DeltaContents,
    folder: Path,
    *,
    dtype: str | torch.dtype | None = None,
    positions: str | None = None,
    scores: Mapping[str, float] | None = None,
    reference_scores: Mapping[str, float] | None = None,
    side_files: Mapping[str, Path | bytes | None] | None = None,
) -> Path:
    """Write a delta that is in memory or in another folder; whole or not at all.

    Args and errors: as :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.save_pretrained`.
    """
    saved, seeded = _as_saved(contents, dtype, positions)
    with output_folder(folder, DELTA, overwrite=True, argument="folder", also=side_files or ()) as temporary:
        write_files(
            temporary,
            saved,
            seeded=seeded,
            dtype=saved.info().dtype,
            factors_dtype=saved.info().factors_dtype,
            rest=saved.info().rest,
            seed_only=positions == "seed",
            side_files=side_files,
            scores=scores,
            reference_scores=reference_scores,
        )
    return folder


def write_files(
    folder: Path,
    contents: DeltaContents,
    *,
    seeded: bool,
    dtype: str | None,
    factors_dtype: str | None = None,
    rest: bool = False,
    seed_only: bool = False,
    side_files: Mapping[str, Path | bytes | None] | None = None,
    scores: Mapping[str, float] | None = None,
    reference_scores: Mapping[str, float] | None = None,
) -> None:
    """Write a delta's files into a folder, also while it is drawn or merged, the kept entries one tensor at a time.

    Args:
        folder: exists; the caller makes it appear whole.
        contents: its description is asked for when all tensors have been read.
        seeded: store no positions, as they follow from the seed, if a reader would draw them.
        dtype, factors_dtype, rest: as of ``DeltaInfo``.
        seed_only: refuse to store positions that follow from the seed.
        side_files, scores, reference_scores: as for
            :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.save_pretrained`.

    Raises:
        ValueError: names that no reader would take.
        OSError: it cannot be written.
    """
    copy_files(side_files or {}, folder)
    absent = tuple(sorted(name for name, content in (side_files or {}).items() if content is None))
    with (folder / MODEL_FILE).open("wb") as file:
        table, checksum, seeded = write_model(
            file, contents, seeded=seeded, dtype=dtype, factors_dtype=factors_dtype, rest=rest, seed_only=seed_only
        )
    info = replace(contents.info(), absent_files=absent)
    (folder / CONFIG_FILE).write_bytes(write_config(info, seeded=seeded, model_checksum=checksum))
    _write_card(folder, info, table, {**contents.carried, **contents.new_rows}, scores, reference_scores)


def set_q(folder: Path, q: float) -> None:
    """Put another q into a delta folder: the kept values are stored undivided, so that they stay as they are.

    Raises:
        ValueError: q is not a finite number above 0.
    """
    config = with_q((folder / CONFIG_FILE).read_bytes(), q)
    (folder / CONFIG_FILE).write_bytes(config)
    tensors = load_tensors(folder / MODEL_FILE)
    dense = {name: tensor for name, tensor in tensors.items() if name not in BLOBS}
    _write_card(folder, read_config(config)[0], read_table(_blob(tensors, TABLE).numpy().data), dense)


def delta_bytes(folder: Path) -> int:
    """Bytes of the model and config file of a delta folder, and of the weights of further modules beside them."""
    files = (folder / MODEL_FILE, folder / CONFIG_FILE, *module_weights(folder).values())
    return sum(path.stat().st_size for path in files)


def further_bytes(folder: Path) -> int:
    """Bytes of what lies in a delta folder beside the delta and its card: configuration and tokenizer files."""
    everything = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    card = folder / CARD_FILE
    return everything - delta_bytes(folder) - (card.stat().st_size if card.is_file() else 0)


def encode(
    contents: DeltaContents, dtype: str | torch.dtype | None = None, positions: str | None = None
) -> tuple[bytes, bytes]:
    """A delta as the bytes of its model and config file.

    Args and errors: as :meth:`dpp_lightning.delta.sparse_delta.SparseDelta.to_bytes`.
    """
    saved, seeded = _as_saved(contents, dtype, positions)
    file, info = BytesIO(), replace(saved.info(), absent_files=())
    _, checksum, seeded = write_model(
        file,
        saved,
        seeded=seeded,
        dtype=info.dtype,
        factors_dtype=info.factors_dtype,
        rest=info.rest,
        seed_only=positions == "seed",
    )
    return file.getvalue(), write_config(info, seeded=seeded, model_checksum=checksum)


class DeltaReader:
    """A delta's two files, opened and checked; the kept entries are read as they are asked for.

    Args:
        blobs: the tensors of ``delta_model.safetensors``.
        config: the bytes of ``delta_config.json``.
        checksum: xxh3-128 of the model file as it was read.
        folder: where they lie on this machine.

    Attributes:
        info: the delta's description.
        table: names, shapes and ranks.
        carried, new_rows: canonical name to dense tensor.
        chunks: reads the kept entries.
        factors: reads the factors; None where no tensor has any.

    Raises:
        ValueError: a file that is damaged, hostile, or of another format.
    """

    def __init__(self, blobs: Mapping[str, Tensor], config: bytes, checksum: str, folder: Path = Path()) -> None:
        self.folder = folder
        info, seeded, stated_checksum = read_config(config)
        if checksum != stated_checksum:
            raise ValueError(
                f"{MODEL_FILE} does not have the checksum that {CONFIG_FILE} states: one of them is damaged"
            )
        self.table = table = read_table(_blob(blobs, TABLE).numpy().data)
        self.info = replace(info, reverted=table.reverted, unchanged=table.unchanged, names=table.names)
        self.carried = {n.removeprefix(CARRIED): blobs[n] for n in sorted(blobs) if n.startswith(CARRIED)}
        self.new_rows = {n.removeprefix(ROWS): blobs[n] for n in sorted(blobs) if n.startswith(ROWS)}
        known = BLOBS if table.has_factors else (TABLE, KEPT)
        unknown = [name for name in blobs if name not in known and not name.startswith((CARRIED, ROWS))]
        if unknown:
            raise ValueError(f"{MODEL_FILE} holds {unknown[:5]}, which no delta has, or none without factors")
        self._check_dense(dict(table.tensors))
        stored = sum(blob.nbytes for blob in blobs.values())
        check_promise(info.entries, table.tensors, (*self.carried.values(), *self.new_rows.values()), stored)
        kept = _blob(blobs, KEPT).numpy()
        self.chunks = ChunkReader(kept, table.tensors, self.info, seeded=seeded, ranks=table.ranks)
        self.factors: FactorReader | None = None
        if table.has_factors:
            self.factors = FactorReader(_blob(blobs, FACTORS).numpy(), table.tensors, table.ranks, self.info)

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> DeltaReader:
        """A local folder or a hub id. A folder that another takes the place of meanwhile is read once more.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: as the class, or a model or adapter in place of a delta.
        """
        before = _identity(source)
        try:
            return cls._read(source, revision)
        except (OSError, ValueError):
            if _identity(source) == before:
                raise
        return cls._read(source, revision)

    @classmethod
    def _read(cls, source: str | Path, revision: str | None) -> DeltaReader:
        check_delta(source, "delta", revision)
        folder = local_folder(
            source, revision, [MODEL_FILE, CONFIG_FILE, *(f"*{pattern}" for pattern in SIDE_PATTERNS)]
        )
        model = folder / MODEL_FILE
        return cls(load_tensors(model), (folder / CONFIG_FILE).read_bytes(), _file_checksum(model), folder)

    @classmethod
    def from_bytes(cls, model: bytes, config: bytes) -> DeltaReader:
        """The bytes of the two files, as :func:`encode` makes them.

        Raises:
            ValueError: as the class.
        """
        try:
            blobs = load_bytes(model)
        except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{MODEL_FILE} is not a readable safetensors file: {error}") from error
        return cls(blobs, config, xxhash.xxh3_128_hexdigest(model))

    @property
    def contents(self) -> DeltaContents:
        """All of the delta; reading its tensors raises ValueError at chunks that are damaged or hostile."""
        return DeltaContents(self.table.tensors, self._tensors, self.carried, self.new_rows, lambda: self.info)

    def _tensors(self) -> Iterator[tuple[str, SparseTensor]]:
        """Every tensor, its factors with it."""
        if self.factors is None:
            yield from self.chunks.tensors()
            return
        for (name, tensor), factors in zip(self.chunks.tensors(), self.factors.factors(), strict=True):
            yield name, replace(tensor, factors=factors)

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


def _write_card(
    folder: Path,
    info: DeltaInfo,
    table: TensorTable,
    dense: Mapping[str, Tensor],
    scores: Mapping[str, float] | None = None,
    reference_scores: Mapping[str, float] | None = None,
) -> None:
    """Write the card of a folder that has its two files; ``dense`` are the carried tensors and new rows."""
    text = card_text(
        info,
        delta_bytes(folder),
        ranks=[rank for rank in table.ranks if rank is not None],
        factor_numbers=sum(table.factor_numbers),
        carried=len(dense),
        carried_bytes=total_bytes(dense),
        module_bytes={name: path.stat().st_size for name, path in module_weights(folder).items()},
        scores=scores or {},
        reference_scores=reference_scores or {},
    )
    (folder / CARD_FILE).write_bytes(text.encode())


def _blob(blobs: Mapping[str, Tensor], name: str) -> Tensor:
    """The bytes of a blob, shape (bytes,)."""
    blob = blobs.get(name)
    if blob is None or blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"{MODEL_FILE} holds no one-dimensional blob {name!r} of bytes")
    return blob


def _as_saved(
    contents: DeltaContents, dtype: str | torch.dtype | None, positions: str | None
) -> tuple[DeltaContents, bool]:
    """The delta as the file will hold it, and whether positions are left out."""
    info = contents.info()
    coding = positions or ("seed" if info.seeded else "index")
    if coding not in ("seed", "index") or (coding == "seed" and not info.seeded):
        allowed = "'seed' or 'index'" if info.seeded else "'index' (this selection follows from no seed)"
        raise ValueError(f"positions must be {allowed}, got {positions!r}")
    name = info.dtype if dtype is None else str(dtype).removeprefix("torch.")
    check_dtype(name)
    if info.method in METHODS:
        METHODS[info.method].check_dtype(info.method, name)
    held = torch.float32 if name in INTEGERS and name == info.dtype else FLOATS.get(name or "")

    def cast_tensors() -> Iterator[tuple[str, SparseTensor]]:
        for tensor_name, tensor in contents.tensors():
            if name is None or tensor.values.dtype == held:
                yield tensor_name, tensor
            else:
                yield tensor_name, replace(tensor, values=to_dtype(tensor.values, name, tensor.values, tensor_name))

    saved_info = replace(info, dtype=name)
    return replace(contents, tensors=cast_tensors, info=lambda: saved_info), coding == "seed"


def _identity(source: str | Path) -> tuple[int, int] | None:
    """Which folder has a name; None where there is none."""
    try:
        found = local_path(source).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return xxhash.xxh3_128_hexdigest(b"")
        with mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
            return xxhash.xxh3_128_hexdigest(mapped)
