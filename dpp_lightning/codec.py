"""The delta folder: ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card, to bytes and back.

Kept values of all tensors lie in one blob (a header entry for each of 200 tensors would outweigh a delta at p = 0.999);
positions are not stored where the seed gives them, else as int32; carried tensors lie beside them in their own dtype.
Everything read from a file is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from dpp_lightning import __version__
from dpp_lightning.atomic import whole_folder
from dpp_lightning.card import model_card
from dpp_lightning.checkpoints import local_folder
from dpp_lightning.delta import DeltaInfo, SparseDelta, SparseTensor
from dpp_lightning.pruning import VALUE_DTYPES, to_value_dtype
from dpp_lightning.rescaling import check_q
from dpp_lightning.sampling import SAMPLER_VERSION, exact_rate, kept_positions, stream_key

MODEL_FILE, CONFIG_FILE, CARD_FILE = "delta_model.safetensors", "delta_config.json", "README.md"
FORMAT_VERSION = 1
_CARRIED = "carried."
_MOST_ENTRIES = 1 << 36  # of one tensor; a file that claims more is refused before any position is drawn


def encode(
    delta: SparseDelta, dtype: str | torch.dtype | None = None, positions: str | None = None
) -> tuple[bytes, bytes]:
    """A delta as the bytes of its two files.

    Args:
        delta: the delta.
        dtype: dtype of the kept values, default as they are.
        positions: ``seed`` or ``index``; default ``seed`` where the selection is seeded.

    Raises:
        ValueError: unknown dtype or coding, a coding that the selection does not allow, values that overflow.
    """
    coding = positions or ("seed" if delta.info.seeded else "index")
    if coding not in ("seed", "index") or (coding == "seed" and not delta.info.seeded):
        allowed = "'seed' or 'index'" if delta.info.seeded else "'index' (this selection follows from no seed)"
        raise ValueError(f"positions must be {allowed}, got {positions!r}")
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    values = [to_value_dtype(t.values, name, t.values, n).cpu() for n, t in delta.tensors.items()]
    kinds = {v.dtype for v in values} or {torch.float32}
    common = kinds.pop() if len(kinds) == 1 else torch.float32
    blob = {"values": torch.cat([v.to(common) for v in values]) if values else torch.empty(0)}
    if coding == "index":
        wide = any(prod(t.shape) >= 2**31 for t in delta.tensors.values())
        kind = torch.int64 if wide else torch.int32
        parts = [t.indices.cpu().to(kind) for t in delta.tensors.values()]
        blob["indices"] = torch.cat(parts) if parts else torch.empty(0, dtype=kind)
    for carried, tensor in delta.carried.items():
        blob[_CARRIED + carried] = tensor.detach().cpu().contiguous().clone()
    model = save_bytes(blob)
    return model, _config_bytes(delta, coding, common, model)


def _config_bytes(delta: SparseDelta, coding: str, dtype: torch.dtype, model: bytes) -> bytes:
    config = {
        "format": "dpp-delta",
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "checksum": xxhash.xxh3_128_hexdigest(model),
        "positions": coding,
        "sampler_version": SAMPLER_VERSION,
        "values_dtype": str(dtype).removeprefix("torch."),
        **asdict(delta.info),
        "tensors": [[name, list(t.shape), t.values.numel()] for name, t in delta.tensors.items()],
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in config.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def write_folder(
    delta: SparseDelta,
    folder: Path,
    *,
    dtype: str | torch.dtype | None,
    positions: str | None,
    scores: Mapping[str, float] | None,
) -> Path:
    """See :meth:`dpp_lightning.delta.SparseDelta.save_pretrained`."""
    model, config = encode(delta, dtype, positions)
    with whole_folder(folder, replaces=CONFIG_FILE) as temporary:
        (temporary / MODEL_FILE).write_bytes(model)
        (temporary / CONFIG_FILE).write_bytes(config)
        (temporary / CARD_FILE).write_text(model_card(delta, len(model) + len(config), scores or {}), encoding="utf-8")
    return folder


def read_folder(source: str | Path, revision: str | None = None) -> SparseDelta:
    """See :meth:`dpp_lightning.delta.SparseDelta.from_pretrained`."""
    folder = local_folder(source, revision, [MODEL_FILE, CONFIG_FILE])
    missing = [name for name in (MODEL_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no delta folder: it lacks {' and '.join(missing)}")
    return decode((folder / MODEL_FILE).read_bytes(), (folder / CONFIG_FILE).read_bytes())


def decode(model: bytes, config: bytes) -> SparseDelta:
    """The delta in the bytes of the two files.

    Raises:
        ValueError: anything that is not as :func:`encode` writes it.
    """
    settings = _read_config(config)
    if xxhash.xxh3_128_hexdigest(model) != settings["checksum"]:
        raise ValueError(f"{MODEL_FILE} does not have the checksum that {CONFIG_FILE} states: one of them is damaged")
    try:
        blob = load_bytes(model)
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{MODEL_FILE} is not a readable safetensors file: {error}") from error
    info, table = _info(settings), _table(settings)
    values = blob.get("values")
    if values is None or values.dim() != 1 or values.dtype not in VALUE_DTYPES.values():
        raise ValueError(f"{MODEL_FILE} holds no one-dimensional blob 'values' of {', '.join(VALUE_DTYPES)}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{MODEL_FILE} holds values that are not finite")
    if values.numel() != sum(kept for _, _, kept in table):
        raise ValueError(
            f"{MODEL_FILE} holds {values.numel()} values, {CONFIG_FILE} states {sum(k for *_, k in table)}"
        )
    positions = _positions(settings["positions"], table, blob.get("indices"), info)
    parts = values.split([kept for _, _, kept in table])
    tensors = {
        name: SparseTensor(shape, index, part.clone())
        for (name, shape, _), index, part in zip(table, positions, parts, strict=True)
    }
    carried = {name[len(_CARRIED) :]: t for name, t in blob.items() if name.startswith(_CARRIED)}
    if set(carried) & set(tensors):
        raise ValueError(
            f"{MODEL_FILE} holds tensors both pruned and carried: {sorted(set(carried) & set(tensors))[:5]}"
        )
    return SparseDelta(tensors, carried, info)


def _read_config(config: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(config)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is not readable JSON: {error}") from error
    if not isinstance(settings, dict) or settings.get("format") != "dpp-delta":
        raise ValueError(f"{CONFIG_FILE} does not describe a delta (format 'dpp-delta' expected)")
    if settings.get("format_version") != FORMAT_VERSION or settings.get("sampler_version") != SAMPLER_VERSION:
        raise ValueError(
            f"this delta has format {settings.get('format_version')!r}, sampler {settings.get('sampler_version')!r}; "
            f"this library reads format {FORMAT_VERSION} and sampler {SAMPLER_VERSION}: install a newer dpp_lightning"
        )
    if settings.get("positions") not in ("seed", "index") or not isinstance(settings.get("checksum"), str):
        raise ValueError(f"{CONFIG_FILE} lacks a known coding of positions or the checksum")
    return settings


_TYPES: dict[str, type | tuple[type, ...]] = {
    "pruning_rate": (int, float), "q": (int, float), "seed": int, "seeded": bool, "entries": int, "dense_bytes": int,
    "base_name": (str, type(None)), "base_revision": (str, type(None)), "scope": dict, "reverted": list,
}  # fmt: skip


def _info(settings: dict[str, Any]) -> DeltaInfo:
    """The typed part of the config."""
    values: dict[str, Any] = {f.name: settings.get(f.name) for f in fields(DeltaInfo)}
    for key, value in values.items():
        expected = _TYPES.get(key, str)
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{CONFIG_FILE}: {key} is {value!r}")
    exact_rate(values["pruning_rate"])
    check_q(values["q"], values["pruning_rate"])
    stream_key("", values["seed"])
    return DeltaInfo(**{**values, "reverted": tuple(map(str, values["reverted"]))})


def _table(settings: dict[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and kept count of every pruned tensor, in the order of the blob."""
    rows = settings.get("tensors")
    table: list[tuple[str, tuple[int, ...], int]] = []
    for row in rows if isinstance(rows, list) else [None]:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], list)):
            raise ValueError(f"{CONFIG_FILE}: 'tensors' is not a list of [name, shape, kept]: {row!r}")
        name, shape, kept = row
        numbers = [*shape, kept]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or len(shape) > 16:
            raise ValueError(f"{CONFIG_FILE}: tensor {name!r} has shape {shape!r} and {kept!r} kept entries")
        if not kept <= prod(shape) <= _MOST_ENTRIES:
            raise ValueError(f"{CONFIG_FILE}: tensor {name!r} of shape {shape} cannot keep {kept} entries")
        table.append((name, tuple(shape), kept))
    if len({name for name, _, _ in table}) != len(table):
        raise ValueError(f"{CONFIG_FILE} names a tensor twice")
    return table


def _positions(
    coding: str, table: list[tuple[str, tuple[int, ...], int]], indices: Tensor | None, info: DeltaInfo
) -> list[Tensor]:
    """Kept positions of every tensor, drawn from the seed or read, and checked against shape and count."""
    if coding == "seed":
        return [_drawn(name, prod(shape), kept, info) for name, shape, kept in table]
    if indices is None or indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(f"{MODEL_FILE} holds no one-dimensional integer blob 'indices'")
    if indices.numel() != sum(kept for _, _, kept in table):
        raise ValueError(
            f"{MODEL_FILE} holds {indices.numel()} indices, {CONFIG_FILE} states {sum(k for *_, k in table)}"
        )
    parts = [part.clone() for part in indices.split([kept for _, _, kept in table])]
    for (name, shape, _), part in zip(table, parts, strict=True):
        if part.numel() and (
            int(part[0]) < 0 or int(part[-1]) >= prod(shape) or not bool((part[1:] > part[:-1]).all())
        ):
            raise ValueError(
                f"{MODEL_FILE}: indices of {name!r} are not sorted, distinct and inside shape {list(shape)}"
            )
    return parts


def _drawn(name: str, numel: int, kept: int, info: DeltaInfo) -> Tensor:
    expected, p = numel * (1 - info.pruning_rate), info.pruning_rate
    if not info.seeded or abs(kept - expected) > 40 + 40 * sqrt(numel * p * (1 - p)):
        raise ValueError(f"{CONFIG_FILE}: no seed gives {kept} kept of {numel} entries of {name!r} at pruning_rate {p}")
    positions = torch.from_numpy(kept_positions(name, numel, p, info.seed))
    if positions.numel() != kept:
        raise ValueError(f"{CONFIG_FILE}: seed {info.seed} keeps {positions.numel()} entries of {name!r}, not {kept}")
    return positions.to(torch.int32) if numel < 2**31 else positions
