"""What the commands on files have in common: a parser, one line for what went wrong, a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

MODEL = "a folder in Hugging Face's layout, a .safetensors or .ckpt file, a sharded checkpoint, or a hub id"
_FAILED, _WRONG = 1, 2


def parser_of(command: str, summary: str) -> argparse.ArgumentParser:
    """The parser of ``dpp COMMAND``."""
    return argparse.ArgumentParser(prog=f"dpp {command}", description=summary)


def run_command(
    parser: argparse.ArgumentParser, arguments: list[str], act: Callable[[argparse.Namespace], None]
) -> int:
    """Parse, act, and say in one line what went wrong."""
    try:
        options = parser.parse_args(arguments[1:])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _WRONG
    try:
        act(options)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        say(f"dpp {arguments[0]}: error: {error}")
        return _WRONG
    except (OSError, MemoryError) as error:
        say(f"dpp {arguments[0]}: failed, nothing was written: {error}")
        return _FAILED
    return 0


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(text + "\n")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], Any]]:
    """A bar on the terminal with bytes a second; called with bytes done and bytes in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
