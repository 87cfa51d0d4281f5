"""A model's folder: which files belong to the model beside its weights.

Such side files are the configuration, the tokenizer, the processor and the chat template. This module decides whose
they are: a delta folder holds those that fine-tuning changed; a merged delta holds those that all its tasks share under
their usual names, the others under their task's name (``sst2.config.json``); base plus delta has the delta's where
there are some, else the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from dpp_lightning.storage.locate import local_folder, local_path

SIDE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.*",
)
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".bpe", ".jinja", ".tiktoken"})  # neither code nor pickles


def side_files(source: str | Path, revision: str | None = None) -> dict[str, Path]:
    """What belongs to a model beside its weights: configuration, tokenizer, processor, chat template.

    Neither code nor pickles are among them.

    Args:
        source: a local folder, a hub id, or a file of weights.
        revision: branch, tag or commit of a hub id.

    Returns:
        File name to path, sorted; nothing for a source that is a file.

    Raises:
        FileNotFoundError: neither file nor folder nor of the form of a hub id.
    """
    return {name: path for name, path in _files(source, revision).items() if _is_side_file(name)}


def changed_side_files(
    base: str | Path, finetuned: str | Path, base_revision: str | None = None, finetuned_revision: str | None = None
) -> dict[str, Path]:
    """The side files that a delta has to hold: the fine-tuned model's where they do not say the same as the base's.

    Args:
        base, finetuned, base_revision, finetuned_revision: each as for :func:`side_files`.
    """
    base_files = side_files(base, base_revision)
    return {
        name: path
        for name, path in side_files(finetuned, finetuned_revision).items()
        if not (name in base_files and _same_content(base_files[name], path))
    }


def merged_side_files(folders: Mapping[str, Path]) -> dict[str, Path]:
    """The side files of a merged delta.

    Args:
        folders: task to the folder of its delta.

    Returns:
        File name to path: a file that all folders have byte for byte under its own name, any other as ``TASK.name``.
    """
    by_task = {task: side_files(folder) for task, folder in folders.items()}
    merged: dict[str, Path] = {}
    for task, files in by_task.items():
        for name, path in files.items():
            content = path.read_bytes()
            shared = all(name in other and other[name].read_bytes() == content for other in by_task.values())
            merged[name if shared else f"{task}.{name}"] = path
    return merged


def dense_side_files(
    base: str | Path,
    delta: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    tasks: Sequence[str] = (),
    task: str | None = None,
) -> dict[str, Path]:
    """The side files of base plus delta: the base's, or the delta's where it has some.

    Args:
        base, delta, base_revision, delta_revision: each as for :func:`side_files`.
        tasks: those that the delta merges, none for a delta of one model.
        task: the one whose files are wanted.
    """
    files, starts = _files(delta, delta_revision, tasks), tuple(f"{name}." for name in tasks)
    shared = {name: path for name, path in files.items() if _is_side_file(name) and not name.startswith(starts)}
    start = f"{task}."
    of_task = {name[len(start) :]: path for name, path in files.items() if task and name.startswith(start)}
    of_task = {name: path for name, path in of_task.items() if _is_side_file(name)}
    return {**side_files(base, base_revision), **shared, **of_task}


def copy_files(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write files into a folder that is there.

    Args:
        files: name to the path of what is copied, or to its bytes.
        folder: where to.

    Raises:
        OSError: it cannot be written.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())


def _files(source: str | Path, revision: str | None, tasks: Sequence[str] = ()) -> dict[str, Path]:
    """All files of a folder, sorted; of a hub id side files alone are fetched, those of the tasks among them."""
    if local_path(source).is_file():
        return {}
    starts = ("", *(f"{escape(task)}." for task in tasks))
    folder = local_folder(source, revision, [s + p for s in starts for p in SIDE_PATTERNS], "file or folder")
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}


def _is_side_file(name: str) -> bool:
    return Path(name).suffix in _SIDE_SUFFIXES and any(fnmatchcase(name, pattern) for pattern in SIDE_PATTERNS)


def _same_content(a: Path, b: Path) -> bool:
    """Equal byte for byte, or JSON that says the same (libraries write it with and without spaces)."""
    first, second = a.read_bytes(), b.read_bytes()
    if first == second or a.suffix != ".json":
        return first == second
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False
