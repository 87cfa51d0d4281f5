"""Whether two paths lead to one place, or one into the other, however they are spelled and through links."""

from __future__ import annotations

import os
from pathlib import Path

from dpp_lightning.storage.locate import local_path


def real_path(path: str | Path) -> Path:
    """The absolute path with ``~`` as the home directory and all links followed, also where nothing is there yet."""
    return Path(os.path.realpath(local_path(path)))


def same_place(a: str | Path, b: str | Path) -> bool:
    """Whether two paths are one file or folder; of what is not there yet, whether they would be.

    File systems that ignore case are asked where both paths are there.
    """
    first, second = real_path(a), real_path(b)
    try:
        return os.path.samefile(first, second)
    except OSError:  # one of them is not there
        return os.path.normcase(first) == os.path.normcase(second)


def lies_in(inner: str | Path, outer: str | Path) -> bool:
    """Whether a path lies below another, as it is spelled or where its links lead; not whether it is the same."""
    spelled = Path(os.path.abspath(local_path(inner)))
    parents = {*spelled.parents, *real_path(inner).parents}
    return not same_place(inner, outer) and any(same_place(parent, outer) for parent in parents)


def links_into(folder: str | Path, outer: str | Path) -> Path | None:
    """A link inside a folder that leads to a place in another folder; None where there is none."""
    for parent, folders, files in os.walk(local_path(folder)):
        for name in sorted((*folders, *files)):
            path = Path(parent, name)
            if path.is_symlink() and (same_place(path, outer) or lies_in(real_path(path), outer)):
                return path
    return None
