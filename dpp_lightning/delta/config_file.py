"""``delta_config.json``: the description of a delta, to JSON and back, with every field checked.

Fields that have their usual value are left out, and names of tensors are in the model file's table
(:mod:`dpp_lightning.delta.table_blob`), so that a small delta is no larger for its description.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

import xxhash

from dpp_lightning._version import __version__
from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.sampling.sampler import SAMPLER_VERSION, exact_rate, stream_key
from dpp_lightning.storage.locate import few_names
from dpp_lightning.storage.model_folder import check_side_name
from dpp_lightning.storage.safe_text import has_controls, is_task_name
from dpp_lightning.tensors.dtypes import DTYPES

CONFIG_FILE = "delta_config.json"
FORMAT_VERSION = 3
_FORMAT, _MODEL_CHECKSUM, _CONFIG_CHECKSUM = "dpp-delta", "model_checksum", "config_checksum"
_MOST_NUMBER = 1 << 62
_MOST_FILES = 10_000
_IN_TABLE = ("reverted", "unchanged", "names")
_USUAL: dict[str, Any] = {"base_name": None, "base_revision": None} | {
    f.name: f.default if f.default is not MISSING else f.default_factory()  # type: ignore[operator]
    for f in fields(DeltaInfo)
    if f.name not in _IN_TABLE and (f.default is not MISSING or f.default_factory is not MISSING)
}  # what a field that is left out stands for


def write_config(info: DeltaInfo, *, seeded: bool, model_checksum: str) -> bytes:
    """The file's bytes.

    Args:
        info: the delta's description; names of tensors are left to the table.
        seeded: positions are not stored.
        model_checksum: xxh3-128 of ``delta_model.safetensors``.

    Raises:
        ValueError: texts or names of files that no reader would take.
    """
    _check_texts(info)
    described = {
        key: value for key, value in asdict(info).items() if key not in _IN_TABLE and value != _USUAL.get(key, MISSING)
    }
    config = {
        "format": _FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "sampler_version": SAMPLER_VERSION,
        "positions": "seed" if seeded else "index",
        **described,
        _MODEL_CHECKSUM: model_checksum,
    }
    config[_CONFIG_CHECKSUM] = config_checksum(config)
    lines = [f" {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in config.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_config(data: bytes) -> tuple[DeltaInfo, bool, str]:
    """What :func:`write_config` was given.

    Returns:
        (info without names of tensors, seeded, model_checksum).

    Raises:
        ValueError: not such a file, damaged, of another version, or with a field out of its range.
    """
    config = _parse(data)
    info = _info(config)
    _check_texts(info)
    seeded, checksum = config.get("positions") == "seed", config.get(_MODEL_CHECKSUM)
    if config.get("positions") not in ("seed", "index") or (seeded and not info.seeded):
        raise ValueError(
            f"{CONFIG_FILE}: positions {config.get('positions')!r} of a selection with seeded={info.seeded}"
        )
    if not isinstance(checksum, str):
        raise ValueError(f"{CONFIG_FILE} lacks {_MODEL_CHECKSUM}")
    return info, seeded, checksum


def with_q(data: bytes, q: float) -> bytes:
    """The same config under another q: the kept values are stored undivided, so nothing else changes.

    Raises:
        ValueError: as :func:`read_config`, or q is not a finite number above 0.
    """
    info, seeded, checksum = read_config(data)
    changed = replace(info, q=check_q(q, info.pruning_rate))
    return write_config(changed, seeded=seeded, model_checksum=checksum)


def config_checksum(config: dict[str, Any]) -> str:
    """xxh3-128 of all other fields, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in config.items() if key != _CONFIG_CHECKSUM}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def _check_texts(info: DeltaInfo) -> None:
    if len(info.absent_files) > _MOST_FILES:
        raise ValueError(f"{CONFIG_FILE}: absent_files has {len(info.absent_files):,} names, at most {_MOST_FILES:,}")
    for name in info.absent_files:
        check_side_name(name)
    trained = [text for item in info.training.items() for text in item]
    for text in (*vars(info).values(), *trained):
        if isinstance(text, str) and has_controls(text):
            raise ValueError(f"{CONFIG_FILE}: control characters in {text!r}")
    if unusable := [task for task in info.tasks if not is_task_name(task)]:
        raise ValueError(f"{CONFIG_FILE}: tasks cannot be named {few_names(map(repr, unusable))}")


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
    "settings": dict, "absent_files": (list, tuple), "factors_dtype": (str, type(None)),
    "drawn_rate": (int, float, type(None)), "rest": bool, "training": dict,
}  # fmt: skip


def _info(config: dict[str, Any]) -> DeltaInfo:
    names = [f.name for f in fields(DeltaInfo) if f.name not in _IN_TABLE]
    values: dict[str, Any] = {name: config.get(name, _USUAL.get(name)) for name in names}
    for key, value in values.items():
        expected = _TYPES.get(key, str)
        huge = isinstance(value, int) and key != "seed" and not 0 <= value < _MOST_NUMBER
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool) or huge:
            raise ValueError(f"{CONFIG_FILE}: {key} is {value!r}")
    exact_rate(values["pruning_rate"])
    check_q(values["q"], values["pruning_rate"])
    stream_key("", values["seed"])
    if values["drawn_rate"] is not None:
        exact_rate(values["drawn_rate"])
    for key in ("dtype", "factors_dtype"):
        if values[key] not in (None, *DTYPES):
            raise ValueError(f"{CONFIG_FILE}: {key} is {values[key]!r}, known are {', '.join(DTYPES)}")
    absent = tuple(values["absent_files"])
    if not all(isinstance(name, str) for name in absent):
        raise ValueError(f"{CONFIG_FILE}: absent_files has names that are not text")
    if not all(_is_plain(v) for key in ("scope", "settings", "training") for v in values[key].values()):
        raise ValueError(f"{CONFIG_FILE}: scope, settings or training hold more than text, numbers and lists of them")
    return DeltaInfo(**{**values, "absent_files": absent})


def _is_plain(value: object) -> bool:
    return all(v is None or isinstance(v, str | int | float) for v in (value if isinstance(value, list) else [value]))
