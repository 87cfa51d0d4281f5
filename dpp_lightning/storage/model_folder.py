"""A model's folder: which files belong to the model beside its weights.

Such side files are the configuration, the tokenizer, the processor, the chat templates and the further modules of a
sentence-transformers model (``1_Pooling/config.json``, ``2_Dense/model.safetensors``). This module decides whose they
are: a delta folder holds those that fine-tuning changed, and names those that the fine-tuned model does not have; a
merged delta holds those that all its tasks share under their usual names, the others under their task's name
(``sst2.config.json``); base plus delta has the delta's where there are some, else the base's that are not absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from dpp_lightning.storage.file_content import check_content, read_json_object
from dpp_lightning.storage.locate import local_folder, local_path
from dpp_lightning.storage.same_content import same_content, weights_as_safetensors

_T = TypeVar("_T")

_MODEL = ("config.json", "generation_config.json")
_PROCESSOR = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",  # of a processor; tokenizers have theirs in a .jinja file or in tokenizer_config.json
)
_TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
_TOKENIZER = (
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "vocab-*.json",
    "*_vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "spiece.model",
    "spm*.model",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "prophetnet.tokenizer",
    "byte_maps.json",
    "normalizer.json",
    "emoji.json",
    "word_*.json",
)
_MODULES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".bpe", ".codes", ".jinja", ".spm", ".tiktoken", ".tokenizer")
_MODULE_WEIGHTS, _TORCH_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_MODULE_GLOB = "[0-9]*_*/*"
_MODULE_FOLDER = re.compile(r"[0-9]{1,3}_[A-Z]\w*", re.ASCII)  # NUMBER_CLASS, as sentence-transformers writes them
SIDE_PATTERNS = (
    *_MODEL, *_PROCESSOR, *_TEMPLATES, *_TOKENIZER, *_MODULES,
    *(_MODULE_GLOB + suffix for suffix in _SIDE_SUFFIXES), f"{_MODULE_GLOB}.safetensors", f"{_MODULE_GLOB}.bin",
)  # fmt: skip
_LONGEST_NAME, _MOST_PARTS = 255, 3  # of a side file: characters, and folders with the file itself


def side_files(source: str | Path, revision: str | None = None) -> dict[str, Path]:
    """What belongs to a model beside its weights: configuration, tokenizer, processor, chat templates, and the further
    modules of a sentence-transformers model with the weights of theirs.

    Neither code nor pickles are among them: a module's ``pytorch_model.bin`` goes by the name ``model.safetensors``,
    and :func:`copy_files` writes it so.

    Args:
        source: a local folder, a hub id, or a file of weights.
        revision: branch, tag or commit of a hub id.

    Returns:
        File name, with ``/`` after a folder inside, to path; sorted; nothing for a source that is a file.

    Raises:
        FileNotFoundError: neither file nor folder nor of the form of a hub id.
        ValueError: one of them is a link that leads out of the folder.
    """
    return {name: path for name, path in _files(source, revision).items() if is_side_file(name)}


def changed_side_files(
    base: str | Path,
    finetuned: str | Path,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    *,
    weights_only: bool = False,
) -> dict[str, Path | None]:
    """What a delta has to say of side files: the fine-tuned model's where they do not say the same as the base's, and
    those of the base that the fine-tuned model does not have.

    Files are taken to be absent only where the fine-tuned folder has others of their kind: one without any file of a
    tokenizer was saved without its tokenizer, which is the base's.

    Args:
        base, finetuned, base_revision, finetuned_revision: each as for :func:`side_files`.
        weights_only: only weights of further modules.

    Returns:
        File name to path, or to None for what is absent.

    Raises:
        ValueError: a link that leads out of its folder, or a changed file of JSON that cannot be read.
    """
    base_files, finetuned_files = side_files(base, base_revision), side_files(finetuned, finetuned_revision)
    changed: dict[str, Path | None] = {
        name: path
        for name, path in finetuned_files.items()
        if not (name in base_files and same_content(base_files[name], path))
    }
    if weights_only:
        return {name: path for name, path in changed.items() if is_module_weights(name)}
    _check_files(changed)
    absent = [name for name in base_files if name not in finetuned_files and _kind_is_known(name, finetuned_files)]
    return changed | dict.fromkeys(absent)


def merged_side_files(
    folders: Mapping[str, Path], absent: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Path | None]:
    """The side files of a merged delta.

    Args:
        folders: task to the folder of its delta.
        absent: task to the names of the base's files that its model does not have.

    Returns:
        File name to path, or to None for what is absent: what all deltas have byte for byte under its own name, any
        other as ``TASK.name``.

    Raises:
        ValueError: a link that leads out of its folder, or a file of JSON that cannot be read.
    """
    by_task: dict[str, dict[str, Path | None]] = {
        task: {**dict.fromkeys((absent or {}).get(task, ())), **side_files(folder)} for task, folder in folders.items()
    }
    merged: dict[str, Path | None] = {}
    for task, files in by_task.items():
        for name, path in files.items():
            content = path and path.read_bytes()
            shared = all(
                name in other and ((at := other[name]) and at.read_bytes()) == content for other in by_task.values()
            )
            merged[name if shared else f"{task}.{name}"] = path
    _check_files(merged)
    return merged


def dense_side_files(
    base: str | Path,
    delta: str | Path,
    *,
    base_revision: str | None = None,
    delta_revision: str | None = None,
    tasks: Sequence[str] = (),
    task: str | None = None,
    absent: Sequence[str] = (),
) -> dict[str, Path]:
    """The side files of base plus delta: the delta's where it has some, else the base's but those that are absent.

    Args:
        base, delta, base_revision, delta_revision: each as for :func:`side_files`.
        tasks: those that the delta merges, none for a delta of one model.
        task: the one whose files are wanted.
        absent: names of files that the fine-tuned model does not have, as ``DeltaInfo.absent_files``.

    Raises:
        ValueError: a link that leads out of its folder, or a file of JSON that cannot be read.
    """
    of_delta = delta_side_files(delta, delta_revision, tasks=tasks, task=task, absent=absent)
    files = {**side_files(base, base_revision), **of_delta}
    dense = {name: path for name, path in files.items() if path is not None}
    _check_files(dense)
    return dense


def delta_side_files(
    delta: str | Path,
    revision: str | None = None,
    *,
    tasks: Sequence[str] = (),
    task: str | None = None,
    absent: Sequence[str] = (),
) -> dict[str, Path | None]:
    """What a delta says of side files, as one task uses them: name to path, or to None for what is absent.

    Args:
        delta, revision: as for :func:`side_files`.
        tasks, task, absent: as for :func:`dense_side_files`.

    Raises:
        ValueError: a link that leads out of the folder.
    """
    gone: dict[str, Path | None] = dict.fromkeys(absent)
    return {
        **names_of_task(gone, tasks, task),
        **names_of_task(_files(delta, revision, tasks), tasks, task),
    }


def names_of_task(files: Mapping[str, _T], tasks: Sequence[str], task: str | None) -> dict[str, _T]:
    """The side files of a delta as one task uses them: those that all share, and its own under their usual names.

    Args:
        files: name in the delta's folder to anything.
        tasks: those that the delta merges, none for a delta of one model.
        task: one of them; None for what all share.
    """
    start, starts = f"{task}.", tuple(f"{name}." for name in tasks)
    shared = {name: item for name, item in files.items() if is_side_file(name) and not name.startswith(starts)}
    own = {name[len(start) :]: item for name, item in files.items() if task and name.startswith(start)}
    return {**shared, **{name: item for name, item in own.items() if is_side_file(name)}}


def module_weights(folder: Path) -> dict[str, Path]:
    """The weights of further modules in a delta's folder, those of all tasks: file name to path."""
    return {name: path for name, path in _files(folder, None).items() if is_module_weights(name)}


def is_side_file(name: str) -> bool:
    """Whether a name in a model's folder, with ``/`` after a folder inside, is that of a side file."""
    folder, slash, file = name.partition("/")
    known_suffix = PurePosixPath(name).suffix in _SIDE_SUFFIXES
    if slash and _MODULE_FOLDER.fullmatch(folder):
        return name.count("/") < _MOST_PARTS and (known_suffix or is_module_weights(name))
    if slash:
        return "/" not in file and _matches(name, _TEMPLATES)
    return known_suffix and _matches(name, (*_MODEL, *_PROCESSOR, *_TEMPLATES, *_TOKENIZER, *_MODULES))


def is_module_weights(name: str) -> bool:
    """Whether a side file, possibly of a task, holds weights: those of a further module."""
    return PurePosixPath(name).name == _MODULE_WEIGHTS and "/" in name


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file is a tokenizer's: words, settings, chat templates."""
    return _matches(name, (*_TOKENIZER, *_TEMPLATES))


def check_side_name(name: str) -> str:
    """The name of a side file as it is, if it is safe as a path inside a folder.

    Raises:
        ValueError: not a relative path of at most two folders and a file, with ``/`` between them.
    """
    parts, whole = name.split("/"), PureWindowsPath(name)
    plain = not (whole.drive or whole.root or "\\" in name or ":" in name or {"", ".", ".."} & set(parts))
    if not plain or not name.isprintable() or len(parts) > _MOST_PARTS or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"a file beside the weights cannot be named {name[:_LONGEST_NAME]!r}: expected a plain name, or up to two "
            "folders and a name with '/' between them"
        )
    return name


def copy_files(files: Mapping[str, Path | bytes | None], folder: Path) -> None:
    """Write files into a folder that is there; folders inside are made.

    Args:
        files: name to the path of what is copied, or to its bytes; what has None is left out. A PyTorch file of weights
            is written as safetensors where the name says so.
        folder: where to.

    Raises:
        ValueError: a name that leads out of the folder, or a file of weights that cannot be read.
        OSError: it cannot be written.
    """
    for name, content in files.items():
        target = folder / check_side_name(name)
        if content is None:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif is_module_weights(name) and content.suffix == ".bin":
            target.write_bytes(weights_as_safetensors(content))
        else:
            target.write_bytes(content.read_bytes())


def _files(source: str | Path, revision: str | None, tasks: Sequence[str] = ()) -> dict[str, Path]:
    """Files of a folder and of its folders inside where side files may be, sorted; of a hub id side files alone are
    fetched, those of the tasks among them."""
    if local_path(source).is_file():
        return {}
    starts = ("", *(f"{escape(task)}." for task in tasks))
    folder = local_folder(source, revision, [s + p for s in starts for p in SIDE_PATTERNS], "file or folder")
    paths = [path for path in folder.iterdir() if path.is_file()]
    for inside in folder.iterdir():
        if inside.is_dir() and _may_hold_side_files(inside.name):
            paths += [path for path in inside.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    _check_links(files, folder)
    for name in [name for name in files if "/" in name and name.endswith(f"/{_TORCH_WEIGHTS}")]:
        path = files.pop(name)
        files.setdefault(f"{name.removesuffix(_TORCH_WEIGHTS)}{_MODULE_WEIGHTS}", path)
    return files


def _check_links(files: Mapping[str, Path], folder: Path) -> None:
    """Refuse side files, possibly of a task, that are links out of their folder, so that nobody's other files get into
    a delta; those of the hub's cache lead to the blobs of their repository."""
    root = folder.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for name, path in files.items():
        meant = (name, *(name[dot + 1 :] for dot, letter in enumerate(name) if letter == "."))
        if any(map(is_side_file, meant)) and not any(path.resolve().is_relative_to(place) for place in roots):
            raise ValueError(
                f"{path} leads to {path.resolve()}, out of its folder, and is not followed: put a copy of that file in "
                "its place, or remove it"
            )


def _check_files(files: Mapping[str, Path | None]) -> None:
    """Refuse names that no side file can have, files of JSON that cannot be read, and configurations that are no
    objects."""
    for name, path in files.items():
        check_side_name(name)
        if path is not None and name.endswith(".json"):
            check_content(path)
            if PurePosixPath(name).name.endswith(_MODEL):
                read_json_object(path)


def _may_hold_side_files(folder: str) -> bool:
    """By its name, which in a merged delta may begin with a task's."""
    name = folder.rpartition(".")[2]
    return _MODULE_FOLDER.fullmatch(name) is not None or name == "additional_chat_templates"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _kind_is_known(name: str, files: Mapping[str, Path]) -> bool:
    """Whether a folder with these side files says something of the kind of another one, so that its lack means that
    the model has no such file."""
    if name == "config.json":
        return False  # no folder loads without it
    if name in _MODEL:
        return "config.json" in files
    if ("/" in name and not _matches(name, _TEMPLATES)) or _matches(name, _MODULES):
        return "modules.json" in files
    kind: Sequence[str] = _PROCESSOR if name in _PROCESSOR else _TOKENIZER
    further = _TEMPLATES if _matches(name, _TEMPLATES) else ()  # a template alone says nothing of the tokenizer
    return any(_matches(other, (*kind, *further)) for other in files)
