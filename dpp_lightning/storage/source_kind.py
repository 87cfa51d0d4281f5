"""What lies at a source: a model, a delta, an adapter, a folder of logs; checked before anything long begins.

A source of another kind than wanted, and a file that is damaged, are refused in one line that names the argument, says
what the source is, and how it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from dpp_lightning.storage.file_content import TORCH_SUFFIXES, check_content, read_json, read_json_object
from dpp_lightning.storage.locate import few_names, local_folder, local_path, not_found, subject
from dpp_lightning.storage.quantised import refuse_gguf
from dpp_lightning.storage.sharded_checkpoint import is_sharded

DELTA_CONFIG, DELTA_MODEL = "delta_config.json", "delta_model.safetensors"
_MODEL_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"
_KIND_FILES = (_MODEL_CONFIG, _ADAPTER_CONFIG, DELTA_CONFIG)
_NO_WEIGHTS = (".json", ".yaml", ".yml", ".txt", ".md", ".jsonl", ".csv", ".parquet", ".py", ".gguf", ".h5", ".onnx")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LOG_FILES = ("hparams.yaml", "metrics.csv")
_DEPTH, _FOLDERS = 4, 500
_MERGE_ADAPTER = (
    "merge it into its base first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
)


def check_model(
    source: str | Path,
    argument: str = "",
    revision: str | None = None,
    *,
    order: str = "",
    config: bool = False,
    adapter: bool = False,
) -> None:
    """Refuse a source that is no model, before its weights are read or fetched.

    Args:
        source: folder in Hugging Face's layout, file of weights, sharded checkpoint, or hub id, of which only the
            configuration is fetched.
        argument: what the user calls it, such as ``BASE`` or ``model.pretrained``.
        revision: branch, tag or commit of a hub id.
        order: the command with its arguments in order, for where they may have changed places.
        config: the model is built, so that a folder with ``config.json`` is needed.
        adapter: a folder of a PEFT adapter is welcome too.

    Raises:
        FileNotFoundError: no such file or folder, or one without weights.
        ValueError: a delta, an adapter, or files that are damaged or of another kind.
        PermissionError, ConnectionError: as :func:`dpp_lightning.storage.locate.local_folder`.
    """
    path, name = local_path(source), subject(source, argument)
    wanted = f"; expected {order}" if order else ""
    if path.is_file():
        _check_weights_file(path, name, wanted, config)
        return
    if is_sharded(path) and not config:
        return
    folder = local_folder(source, revision, _KIND_FILES, "file or folder", argument)
    files = _file_names(folder, name)
    if DELTA_CONFIG in files and not _weights(files):
        raise ValueError(
            f"{name} is a delta, not a model{wanted}: dpp apply BASE {source} --output DENSE writes a model"
        )
    if _ADAPTER_CONFIG in files and not adapter and not _weights(files):
        raise ValueError(f"{name} is a PEFT adapter, not a model{wanted}: {_MERGE_ADAPTER}")
    if folder == path:
        _check_weights_folder(folder, files, name, adapter=adapter)
    elif not _weights(files):
        _check_reachable(str(source), revision, files, name)
    if config:
        _check_config(folder, files, name)


def check_delta(source: str | Path, argument: str = "", revision: str | None = None, *, order: str = "") -> None:
    """Refuse a source that is no delta folder, before it is read or its weights are fetched.

    Args:
        source: delta folder or hub id.
        argument, revision, order: as for :func:`check_model`.

    Raises:
        FileNotFoundError: no such folder, or one without a delta.
        ValueError: a model, an adapter, a file, or files that are damaged.
        PermissionError, ConnectionError: as :func:`dpp_lightning.storage.locate.local_folder`.
    """
    path, name = local_path(source), subject(source, argument)
    wanted = f"; expected {order}" if order else ""
    if path.is_file():
        if path.name in (DELTA_MODEL, DELTA_CONFIG):
            raise ValueError(f"{name} is a file of a delta: name its folder, {path.parent}")
        raise ValueError(f"{name} is a file, not a delta folder{wanted}")
    folder = local_folder(source, revision, _KIND_FILES, "folder", argument)
    check_delta_folder(folder, name, wanted, fetched=folder != path)


def check_delta_folder(folder: Path, name: str, wanted: str = "", *, fetched: bool = False) -> None:
    """Refuse a folder of this machine without a whole delta, as :func:`check_delta`.

    Args:
        folder: is there.
        name: how the message begins.
        wanted: what the message says was expected.
        fetched: only the configuration of a repository is in the folder.

    Raises:
        FileNotFoundError, ValueError, PermissionError: as :func:`check_delta`.
    """
    files = _file_names(folder, name)
    needed = (DELTA_CONFIG,) if fetched else (DELTA_MODEL, DELTA_CONFIG)
    missing = [file for file in needed if file not in files]
    if not missing:
        for file in needed:
            check_content(folder / file, f"{name}: {file}")
        return
    if len(missing) < 2 and not fetched:
        raise FileNotFoundError(f"{name} is no delta folder: it lacks {missing[0]}; copy or fetch the whole folder")
    if _ADAPTER_CONFIG in files:
        raise ValueError(f"{name} is no delta folder but a PEFT adapter{wanted}: {_MERGE_ADAPTER}")
    if _MODEL_CONFIG in files or _weights(files):
        raise ValueError(f"{name} is no delta folder but a model{wanted}")
    below = [path.parent for path in _walk(folder) if path.name == DELTA_CONFIG]
    if below:
        raise FileNotFoundError(f"{name} is no delta folder itself; deltas in it are {few_names(below)}: name one")
    raise FileNotFoundError(f"{name} is no delta folder: it lacks {' and '.join(missing)}{_holds(files)}")


def check_data_file(file: str | Path | None, argument: str) -> None:
    """Refuse a file of data, such as calibration texts, that is not there or is damaged; nothing of None.

    Args:
        file: a file of this machine.
        argument: what the user calls it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is empty, or not of the kind that its suffix names.
        PermissionError: it may not be read.
    """
    if file is None:
        return
    path, name = local_path(file), subject(file, argument)
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder, expected a file in it{_holds(_file_names(path, name))}")
    if not path.is_file():
        raise not_found(file, "file", argument)
    check_content(path, name)


def check_configuration(source: str | Path | None, argument: str, revision: str | None = None) -> None:
    """Refuse a source without the configuration of a model; nothing of None.

    Args:
        source: folder or hub id; its weights are not looked at.
        argument, revision: as for :func:`check_model`.

    Raises:
        FileNotFoundError: no such folder, or one without ``config.json``.
        ValueError: it cannot be read.
        PermissionError, ConnectionError: as :func:`dpp_lightning.storage.locate.local_folder`.
    """
    if source is not None:
        folder, name = local_folder(source, revision, _KIND_FILES, "folder", argument), subject(source, argument)
        _check_config(folder, _file_names(folder, name), name)


def check_checkpoint(source: str | Path, argument: str) -> None:
    """Refuse what cannot be a trainer's checkpoint, a ``.ckpt`` file or a sharded folder.

    Args:
        source: a file or folder of this machine.
        argument: what the user calls it.

    Raises:
        FileNotFoundError: no such checkpoint, or a folder without one, with the checkpoints that are found below.
        ValueError: a file that is damaged or of another kind.
        PermissionError: it may not be read.
    """
    path, name = local_path(source), subject(source, argument)
    if path.is_file():
        if path.suffix.lower() in _NO_WEIGHTS:
            raise ValueError(f"{name} is no checkpoint: expected a .ckpt file or a sharded folder")
        check_content(path, name)
    elif not path.is_dir():
        raise not_found(source, "checkpoint", argument)
    elif not is_sharded(path) and not (path / "latest").is_file():  # DeepSpeed's has that file
        files = _file_names(path, name)
        below = _checkpoints(path)
        if below:
            raise FileNotFoundError(
                f"{name} is {_folder_kind(files)}; checkpoints in it are {few_names(below)}: name one"
            )
        raise FileNotFoundError(
            f"{name} is a folder, expected a .ckpt file or a sharded folder (.metadata and *.distcp files)"
            + _holds(files)
        )


def _check_weights_file(path: Path, name: str, wanted: str, config: bool) -> None:
    """Refuse a file that holds no weights of a model."""
    if path.name in (DELTA_MODEL, DELTA_CONFIG):
        raise ValueError(f"{name} is a file of a delta, not a model{wanted}")
    if path.name.startswith("adapter_"):
        raise ValueError(f"{name} is a file of a PEFT adapter, not a model{wanted}: {_MERGE_ADAPTER}")
    refuse_gguf([path.name], name)
    if path.suffix.lower() in _NO_WEIGHTS:
        raise ValueError(
            f"{name} is no file of weights: expected a folder in Hugging Face's layout, or a file that ends in "
            f".safetensors, {', '.join(TORCH_SUFFIXES)}"
        )
    check_content(path, name)
    if config:
        raise ValueError(f"{name} is a file: expected a folder with config.json and weights, or a hub id")


def _check_reachable(repo_id: str, revision: str | None, files: Iterable[str], name: str) -> None:
    """Refuse a repository of which the cache holds no weights while the hub cannot be asked for them."""
    from dpp_lightning.storage.hub import answers

    if answers(repo_id, revision):
        return
    raise ConnectionError(
        f"{name}: of this repository the hub's cache holds {few_names(sorted(files))} and no weights, and the hub does "
        "not answer or is switched off (HF_HUB_OFFLINE): fetch it when the hub can be reached"
    )


def _check_weights_folder(folder: Path, files: frozenset[str], name: str, *, adapter: bool) -> None:
    """Refuse a folder without weights, or with weights that are damaged."""
    entries = {entry.name for entry in folder.iterdir()}
    if not _weights(files) and adapter and _ADAPTER_CONFIG in files:
        return
    used = _used(_weights(entries))  # with names that are no files: folders, and links to nowhere
    if not used:
        raise _without_weights(folder, files, entries, name)
    for file in used:
        if file not in files:
            raise _no_file(folder / file, name)
        check_content(folder / file, f"{name}: {file}")
    index = next((file for file in _INDEXES if file in files and used[0].startswith(file.partition(".")[0])), None)
    if index is not None:
        _check_shards(folder / index, entries, name)


def _check_shards(index: Path, entries: Iterable[str], name: str) -> None:
    """Refuse an index that cannot be read, or that names files which the folder lacks."""
    check_content(index, f"{name}: {index.name}")
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    missing = sorted(set(map(str, shards.values())) - set(entries)) if isinstance(shards, dict) else []
    if missing:
        raise FileNotFoundError(
            f"{name} lacks shards that {index.name} names: {few_names(missing)}; fetch or copy them"
        )


def _without_weights(folder: Path, files: frozenset[str], entries: Iterable[str], name: str) -> FileNotFoundError:
    """The error for a folder without weights, with those that are found below."""
    if not set(entries):
        return FileNotFoundError(
            f"{name} is an empty folder: expected a model, such as config.json and model.safetensors"
        )
    deltas = sorted({path.parent for path in _walk(folder) if path.name == DELTA_CONFIG})
    if deltas:
        return FileNotFoundError(f"{name} is a folder of deltas ({few_names(deltas)}), not a model")
    below = sorted({p if p.suffix == ".ckpt" else p.parent for p in _walk(folder) if _is_weights(p.name)})
    if below:
        return FileNotFoundError(
            f"{name} is {_folder_kind(files)} without weights; weights in it are {few_names(below)}: name one"
        )
    refuse_gguf(files, name)
    return FileNotFoundError(f"{name} holds no weights (.safetensors, {', '.join(TORCH_SUFFIXES)}){_holds(files)}")


def _check_config(folder: Path, files: frozenset[str], name: str) -> None:
    """Refuse a folder whose ``config.json`` is missing, unreadable or names no kind of model."""
    if _MODEL_CONFIG not in files:
        raise FileNotFoundError(
            f"{name} has no config.json, which says what model it is: save the model with save_pretrained(folder), or "
            "copy config.json from its base"
        )
    check_content(folder / _MODEL_CONFIG, f"{name}: config.json")
    read_json_object(folder / _MODEL_CONFIG, f"{name}: config.json")


def _no_file(path: Path, name: str) -> OSError:
    """The error for a file's name that is no file: a link to nowhere, or a folder."""
    if path.is_symlink() and not path.exists():
        return FileNotFoundError(
            f"{name}: {path.name} is a link to {path.readlink()}, which is not there: fetch or copy it again"
        )
    return IsADirectoryError(f"{name}: {path.name} is a folder, expected a file of weights")


def _file_names(folder: Path, name: str) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in folder.iterdir() if entry.is_file())
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read by this user: change its permissions") from error


def _is_weights(file: str) -> bool:
    """Whether a file's name is that of a model's weights."""
    others = ("adapter_", "delta_model.", "optimizer.", "scheduler.", "rng_state", "training_args.")
    return Path(file).suffix in (".safetensors", *TORCH_SUFFIXES) and not file.startswith(others)


def _weights(files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if _is_weights(file))


def _used(weights: list[str]) -> list[str]:
    """The files that a model is read from: safetensors before PyTorch's, the usual name before others."""
    for suffixes, usual in (((".safetensors",), "model"), (TORCH_SUFFIXES, "pytorch_model")):
        of_kind = [file for file in weights if Path(file).suffix in suffixes]
        if of_kind:
            return [file for file in of_kind if file.startswith(usual)] or of_kind[:1]
    return []


def _walk(folder: Path) -> Iterator[Path]:
    """Files in folders inside, nearest first in each branch; deep and very many folders are left out."""
    for count, (parent, folders, files) in enumerate(os.walk(folder)):
        here = Path(parent)
        if len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        if count >= _FOLDERS:
            return
        folders.sort()
        yield from (here / file for file in sorted(files))


def _checkpoints(folder: Path) -> list[Path]:
    """Lightning's checkpoints in a folder and below."""
    return sorted(
        {
            p.parent if p.name == ".metadata" else p
            for p in _walk(folder)
            if p.suffix == ".ckpt" or p.name == ".metadata"
        }
    )


def _folder_kind(files: frozenset[str]) -> str:
    is_log = any(file in _LOG_FILES or file.startswith("events.out.tfevents") for file in files)
    return "a folder of Lightning's logs" if is_log else "a folder"


def _holds(files: Iterable[str]) -> str:
    listed = sorted(files)
    return f"; it holds {few_names(listed)}" if listed else "; it holds no file"
