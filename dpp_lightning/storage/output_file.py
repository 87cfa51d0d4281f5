"""The rule of :mod:`dpp_lightning.storage.output_folder` for a command that writes one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dpp_lightning.storage.locate import local_path, subject
from dpp_lightning.storage.output_folder import Inputs
from dpp_lightning.storage.same_place import same_place


def check_output_file(
    output: str | Path,
    kind: str,
    is_older: Callable[[Path], bool],
    *,
    overwrite: bool = False,
    inputs: Inputs = (),
    argument: str = "--output",
) -> None:
    """Refuse a file that is not to be written, before anything is read.

    Args:
        output: file that is to be written.
        kind: what is to be in it, such as ``predictions``, in the plural.
        is_older: whether a file that is there is an older one of this kind.
        overwrite: replace an older one.
        inputs: as for :func:`dpp_lightning.storage.output_folder.check_output`.
        argument: what the user calls the output.

    Raises:
        ValueError: it is a folder, or an input.
        FileExistsError: it is there already and not to be replaced.
    """
    name, path = subject(output, argument), local_path(output)
    if path.is_dir():
        raise ValueError(f"{name} is a folder, expected a file in it")
    if not path.exists():
        return
    for label, source in inputs:
        if source and same_place(path, source):
            raise ValueError(f"{name} is the same file as {subject(source, label)}: name another file")
    if not path.is_file() or not is_older(path):
        raise FileExistsError(f"{name} is there and holds no {kind}, so that it is not overwritten: name another file")
    if not overwrite:
        raise FileExistsError(f"{name} holds {kind} already: give --overwrite to replace it, or name another file")
