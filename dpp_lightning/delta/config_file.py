"""``delta_config.json``: everything about a delta but its numbers, to JSON and back, with every field checked."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, replace
from math import prod
from typing import Any

import xxhash

from dpp_lightning._version import __version__
from dpp_lightning.delta.contents import DeltaInfo, Table
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.sampling.sampler import SAMPLER_VERSION, exact_rate, stream_key
from dpp_lightning.storage.model_folder import check_side_name
from dpp_lightning.tensors.dtypes import DTYPES

CONFIG_FILE = "delta_config.json"
FORMAT_VERSION = 2
_FORMAT, _MODEL_CHECKSUM, _CONFIG_CHECKSUM = "dpp-delta", "model_checksum", "config_checksum"
_MOST_ENTRIES = 1 << 36  # of one tensor; a file that claims more is refused before any position is drawn
_MOST_DIMS = 16
_MOST_NUMBER = 1 << 62
_MOST_FILES = 10_000

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # nor turn the line around


def write_config(info: DeltaInfo, table: Table, *, seeded: bool, model_checksum: str) -> bytes:
    """The file's bytes.

    Args:
        info: the delta's description.
        table: canonical name and shape of every pruned tensor, in the order of the chunks.
        seeded: positions are not stored.
        model_checksum: xxh3-128 of ``delta_model.safetensors``.

    Raises:
        ValueError: names that no reader would take.
    """
    _check_names(info, table)
    config = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "sampler_version": SAMPLER_VERSION,
        "positions": "seed" if seeded else "index",
        **asdict(info),
        "tensors": [[name, list(shape)] for name, shape in table],
        _MODEL_CHECKSUM: model_checksum,
    }
    config[_CONFIG_CHECKSUM] = config_checksum(config)
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in config.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_config(data: bytes) -> tuple[DeltaInfo, Table, bool, str]:
    """What :func:`write_config` was given.

    Returns:
        (info, table, seeded, model_checksum).

    Raises:
        ValueError: not such a file, damaged, of another version, or with a field out of its range.
    """
    config = _parse(data)
    info, table = _info(config), _table(config)
    _check_names(info, table)
    seeded, checksum = config.get("positions") == "seed", config.get(_MODEL_CHECKSUM)
    if config.get("positions") not in ("seed", "index") or (seeded and not info.seeded):
        raise ValueError(
            f"{CONFIG_FILE}: positions {config.get('positions')!r} of a selection with seeded={info.seeded}"
        )
    if not isinstance(checksum, str):
        raise ValueError(f"{CONFIG_FILE} lacks {_MODEL_CHECKSUM}")
    return info, table, seeded, checksum


def with_q(data: bytes, q: float) -> bytes:
    """The same config under another q: the kept values are stored undivided, so nothing else changes.

    Raises:
        ValueError: as :func:`read_config`, or q is not a finite number above 0.
    """
    info, table, seeded, checksum = read_config(data)
    changed = replace(info, q=check_q(q, info.pruning_rate))
    return write_config(changed, table, seeded=seeded, model_checksum=checksum)


def config_checksum(config: dict[str, Any]) -> str:
    """xxh3-128 of all other fields, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in config.items() if key != _CONFIG_CHECKSUM}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def check_name(name: str) -> str:
    """A tensor's name as it is, if it is safe to print and, should anyone use it so, as a part of a path.

    Raises:
        ValueError: control characters, half characters (surrogates), a leading ``/`` or a part ``..``.
    """
    parts = name.replace("\\", "/").split("/")
    if _UNPRINTABLE.search(name) or ".." in parts or (len(parts) > 1 and not parts[0]):
        raise ValueError(f"a tensor cannot be named {name!r}: no control characters, leading '/' or parts '..' there")
    return name


def _check_names(info: DeltaInfo, table: Table) -> None:
    for name in (*(n for n, _ in table), *info.reverted, *info.unchanged, *info.names, *info.names.values()):
        check_name(name)
    if len(info.absent_files) > _MOST_FILES:
        raise ValueError(f"{CONFIG_FILE}: absent_files has {len(info.absent_files):,} names, at most {_MOST_FILES:,}")
    for name in info.absent_files:
        check_side_name(name)
    for key, value in vars(info).items():
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise ValueError(f"{CONFIG_FILE}: control characters in {key}, {value!r}")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        config = json.loads(data)
        checksum = config_checksum(config) if isinstance(config, dict) else ""
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{CONFIG_FILE} does not describe a delta (format {_FORMAT!r} expected)")
    versions = (config.get("format_version"), config.get("sampler_version"))
    if versions != (FORMAT_VERSION, SAMPLER_VERSION):
        raise ValueError(
            f"this delta has format {versions[0]!r}, sampler {versions[1]!r}; this library reads format "
            f"{FORMAT_VERSION} and sampler {SAMPLER_VERSION}: install the dpp_lightning that wrote it "
            f"({config.get('library_version')!r}) or a newer one"
        )
    if config.get(_CONFIG_CHECKSUM) != checksum:
        raise ValueError(f"{CONFIG_FILE} does not have the checksum that it states: it is damaged or was edited")
    return config


_TYPES: dict[str, type | tuple[type, ...]] = {
    "pruning_rate": (int, float), "q": (int, float), "seed": int, "seeded": bool, "entries": int, "dense_bytes": int,
    "base_name": (str, type(None)), "base_revision": (str, type(None)), "dtype": (str, type(None)), "scope": dict,
    "settings": dict, "reverted": list, "unchanged": list, "names": dict, "absent_files": list,
}  # fmt: skip
_OPTIONAL: dict[str, list[str]] = {"absent_files": []}  # what a config may lack


def _info(config: dict[str, Any]) -> DeltaInfo:
    values: dict[str, Any] = {f.name: config.get(f.name, _OPTIONAL.get(f.name)) for f in fields(DeltaInfo)}
    for key, value in values.items():
        expected = _TYPES.get(key, str)
        huge = isinstance(value, int) and key != "seed" and not 0 <= value < _MOST_NUMBER
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool) or huge:
            raise ValueError(f"{CONFIG_FILE}: {key} is {value!r}")
    exact_rate(values["pruning_rate"])
    check_q(values["q"], values["pruning_rate"])
    stream_key("", values["seed"])
    if values["dtype"] not in (None, *DTYPES):
        raise ValueError(f"{CONFIG_FILE}: dtype is {values['dtype']!r}, known are {', '.join(DTYPES)}")
    listed = {key: tuple(values[key]) for key in ("reverted", "unchanged", "absent_files")}
    if not all(isinstance(n, str) for names in (*listed.values(), values["names"].values()) for n in names):
        raise ValueError(f"{CONFIG_FILE}: names of tensors or files that are not text")
    if not all(_is_plain(v) for key in ("scope", "settings") for v in values[key].values()):
        raise ValueError(f"{CONFIG_FILE}: scope or settings hold more than text, numbers and lists of them")
    return DeltaInfo(**{**values, **listed})


def _is_plain(value: object) -> bool:
    return all(v is None or isinstance(v, str | int | float) for v in (value if isinstance(value, list) else [value]))


def _table(config: dict[str, Any]) -> Table:
    rows = config.get("tensors")
    table: Table = []
    for row in rows if isinstance(rows, list) else [None]:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], list)):
            raise ValueError(f"{CONFIG_FILE}: 'tensors' is not a list of [name, shape]: {row!r}")
        name, shape = row
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST_ENTRIES for n in shape)
        if not whole or len(shape) > _MOST_DIMS or prod(shape) > _MOST_ENTRIES:
            raise ValueError(f"{CONFIG_FILE}: tensor {name!r} has shape {shape!r}")
        table.append((name, tuple(shape)))
    if len({name for name, _ in table}) != len(table):
        raise ValueError(f"{CONFIG_FILE} names a tensor twice")
    return table
