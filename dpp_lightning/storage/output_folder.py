"""The one rule about the folder that a command or a function writes.

- It is new or empty; or it holds an older product of the same kind, which is replaced on request alone (``overwrite``),
  at once when the new one is complete.
- A folder that holds anything else is never replaced; the message names what it holds.
- It is none of the inputs, and lies neither inside nor around one.

All of this is checked before anything is read, and what the folder holds once more before it is replaced.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

from dpp_lightning.storage.atomic_write import atomic_folder, is_unfinished, remove_leftovers
from dpp_lightning.storage.locate import few_names, hub_id, local_path, subject
from dpp_lightning.storage.model_folder import is_side_file
from dpp_lightning.storage.safetensors_writer import INDEX_FILE, SINGLE_FILE
from dpp_lightning.storage.same_place import lies_in, links_into, real_path, same_place
from dpp_lightning.storage.source_kind import DELTA_CONFIG, DELTA_MODEL

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)  # by the user's rights; else the disk is full or broken

Inputs: TypeAlias = Sequence[tuple[str, str | Path | None]]  # what the user calls a source, and the source itself


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written here.

    Attributes:
        name: such as ``a delta``, for messages.
        marks: patterns of the names of files; a folder with one of them is of this kind.
        files: names of all further files that belong to it, with ``/`` after a folder inside. A model's side files do
            so too.
        several: a folder that holds nothing but folders of this kind is one too.
    """

    name: str
    marks: tuple[str, ...]
    files: tuple[str, ...] = ()
    several: bool = False

    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds something of this kind, whatever else it holds."""
        return self._is_marked(folder) or (self.several and any(map(self._is_marked, folder.iterdir())))

    def foreign(self, folder: Path, also: Iterable[str] = ()) -> list[str]:
        """Names of what a folder holds and does not belong to its kind, sorted; a folder inside ends in ``/``.

        Args:
            folder: is there.
            also: further names of files that belong to it.
        """
        if self.several and not self._is_marked(folder):
            inside = sorted(folder.iterdir())
            of_parts = [f"{p.name}/{name}" for p in inside if self._is_marked(p) for name in self.foreign(p)]
            return [*of_parts, *(_shown(p, folder) for p in inside if not self._is_marked(p))]
        known, tasks = {*self.files, *also}, _merged_tasks(folder)
        return sorted(name for name in _contents(folder) if not self._owns(name, known, tasks))

    def _is_marked(self, folder: Path) -> bool:
        return folder.is_dir() and any(self._is_mark(path.name) for path in folder.iterdir() if path.is_file())

    def _is_mark(self, name: str) -> bool:
        return any(fnmatchcase(name, mark) for mark in self.marks)

    def _owns(self, name: str, known: Set[str], tasks: Sequence[str]) -> bool:
        plain = next((name[len(task) + 1 :] for task in tasks if name.startswith(f"{task}.")), name)
        return name in known or self._is_mark(name) or is_side_file(name) or is_side_file(plain)


DELTA = FolderKind(
    "a delta",
    (DELTA_CONFIG, DELTA_MODEL),
    ("README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)
DENSE = FolderKind("a model", (SINGLE_FILE, INDEX_FILE, "model-[0-9]*-of-[0-9]*.safetensors"))
DENSE_OF_TASKS = FolderKind("a model, or one for each task", DENSE.marks, several=True)


def check_output(
    output: str | Path,
    kind: FolderKind,
    *,
    overwrite: bool = False,
    inputs: Inputs = (),
    argument: str = "output",
    also: Iterable[str] = (),
) -> None:
    """Refuse an output folder that is not to be written, before anything is read.

    What killed runs left beside it is removed.

    Args:
        output: folder that is to be written.
        kind: what is to be in it.
        overwrite: replace an older one of this kind.
        inputs: what is read, by the user's name for it and as a path or hub id (a ``Path`` is of this machine); None
            for what is not given.
        argument: what the user calls the output, such as ``--output``.
        also: names of further files that the new folder has and an older one may have.

    Raises:
        ValueError: the output is, holds or lies in an input, or cannot be replaced where it is.
        FileExistsError: it holds something that is not replaced.
        NotADirectoryError, PermissionError: it cannot be made where it should be.
        OSError: the disk there is full or broken.
    """
    name, folder = subject(output, argument), real_path(output)
    for label, source in inputs:
        if source:  # an empty word is refused where the source is looked for
            _check_apart(folder, output, source, name, subject(source, label))
    if folder.is_symlink():
        raise ValueError(f"{name} is a link that leads round to itself: remove it, or name another folder")
    if same_place(folder, ".") or lies_in(".", folder) or os.path.ismount(folder):
        where = "where a disk is mounted" if os.path.ismount(folder) else "the current folder or one around it"
        raise ValueError(f"{name} is {where}, whose place no other folder can take: name a folder inside it")
    remove_leftovers(folder.parent)
    _check_contents(folder, kind, overwrite, name, also)
    _check_parent(folder, name)


@contextmanager
def output_folder(
    output: str | Path,
    kind: FolderKind,
    *,
    overwrite: bool = False,
    inputs: Inputs = (),
    argument: str = "output",
    also: Iterable[str] = (),
) -> Iterator[Path]:
    """A temporary folder that takes the output's place when the block ends without an exception.

    An output that is a link stays one: the folder that it leads to is written. One that lies in a temporary folder of
    this process, as a part of a larger output, is written in its place without checks.

    Args and errors: as :func:`check_output`; and OSError where it cannot be written.
    """
    also = frozenset(also)
    if is_unfinished(real_path(output)):
        with atomic_folder(real_path(output), lambda: None) as folder:
            yield folder
        return
    check_output(output, kind, overwrite=overwrite, inputs=inputs, argument=argument, also=also)
    name, folder = subject(output, argument), real_path(output)
    with atomic_folder(folder, lambda: _check_contents(folder, kind, overwrite, name, also)) as temporary:
        yield temporary


def _check_apart(folder: Path, output: str | Path, source: str | Path, name: str, other: str) -> None:
    """Refuse an output that is, holds or lies in an input, or would hide a repository of the hub."""
    if isinstance(source, str) and (repository := hub_id(source)) is not None:
        first, here = Path(repository).parts[0], real_path(".")
        if folder.is_relative_to(here) and folder.relative_to(here).parts[:1] == (first,):
            raise ValueError(f"{name} makes a folder {first}, which hides the hub's {other}: name another folder")
    elif same_place(folder, source):
        what = "file" if local_path(source).is_file() else "folder"
        raise ValueError(f"{name} is the same {what} as {other}: name another folder")
    elif lies_in(output, source):
        raise ValueError(f"{name} lies in {other}: name a folder outside it")
    elif lies_in(source, folder):
        raise ValueError(f"{name} holds {other}: name another folder")
    elif folder.is_dir() and local_path(source).is_dir() and (link := links_into(source, folder)):
        raise ValueError(f"{name} holds what {link} of {other} is a link to: name another folder")


def _check_contents(folder: Path, kind: FolderKind, overwrite: bool, name: str, also: Iterable[str]) -> None:
    """Refuse a folder that holds what is not to be replaced.

    Raises:
        FileExistsError: with what it holds, and the cure.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{name} is a file, which is not overwritten: name a folder that is new or empty")
    if not kind.is_in(folder):
        held = few_names([_shown(path, folder) for path in sorted(folder.iterdir())])
        raise FileExistsError(
            f"{name} holds {held}, not {kind.name}, and is not overwritten: name a folder that is new or empty"
        )
    if foreign := kind.foreign(folder, also):
        raise FileExistsError(
            f"{name} holds other files beside {kind.name}, {few_names(foreign)}, and is not overwritten: move them "
            "away, or name another folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"{name} holds {kind.name} already: give --overwrite (overwrite=True) to replace it, or name another folder"
        )


def _check_parent(folder: Path, name: str) -> None:
    """Refuse a folder that cannot be made or replaced, since what is to hold it is a file or may not be written."""
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{name} cannot be made: {above} is a file; name another folder")
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        message = f"{name} cannot be made: cannot write into {above}: {error.strerror or error}; name another folder"
        raise (PermissionError if error.errno in _FORBIDDEN else OSError)(message) from error


def _contents(folder: Path) -> Iterator[str]:
    """Names of all files below a folder and of its empty folders, with ``/`` after a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            yield from (f"{path.name}/{name}" for name in _contents(path))
        else:
            yield _shown(path, folder)


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")


def _merged_tasks(folder: Path) -> list[str]:
    """Tasks of the merged delta that a folder holds; none of anything else."""
    try:
        tasks = json.loads((folder / DELTA_CONFIG).read_bytes())["settings"]["tasks"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [str(task) for task in tasks] if isinstance(tasks, list) else []
