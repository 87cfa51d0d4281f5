"""An earlier run in an output folder is moved aside as a whole, so that rows and deltas of one run stay together."""

from __future__ import annotations

import re
from pathlib import Path

from dpp_lightning.methods.registry import METHODS

_DELTA = re.compile(rf"({'|'.join(map(re.escape, sorted(METHODS)))})-p[0-9][0-9.e+-]*-seed[0-9]+")


def entries_of_run(folder: Path, files: tuple[str, ...]) -> list[Path]:
    """What a run wrote into its folder: delta folders by their names, then the files among those that it may write."""
    if not folder.is_dir():
        return []
    deltas = sorted(p for p in folder.iterdir() if p.is_dir() and _DELTA.fullmatch(p.name))
    return [*deltas, *(folder / name for name in files if (folder / name).is_file())]


def next_name(folder: Path) -> Path:
    """The folder inside an output folder that its present run would be moved into: ``earlier-1``, ``earlier-2``, …"""
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    return folder / f"earlier-{number}"


def move_aside(folder: Path, files: tuple[str, ...]) -> Path | None:
    """Move an earlier run's deltas and files, and nothing else, into a folder of their own inside the output folder.

    Args:
        folder: the output folder; it need not exist.
        files: names of the files of a run; the one that names the rows comes first and is moved last.

    Returns:
        Where they are now; None if there were none.

    Raises:
        OSError: they cannot be moved.
    """
    entries = entries_of_run(folder, files[::-1])
    if not entries:
        return None
    target = next_name(folder)
    target.mkdir()
    for entry in entries:
        entry.rename(target / entry.name)
    return target
