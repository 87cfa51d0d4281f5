"""A command of ``dpp`` made from one Python function: its signature and docstring are the command line."""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
import time
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dpp_lightning.cli.exit_codes import DONE, USAGE_ERROR, describe
from dpp_lightning.cli.given_settings import INLINE, read_settings, refuse_repeated
from dpp_lightning.cli.home import expand_home
from dpp_lightning.cli.near_miss import explain
from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.storage.safe_text import printable_lines

_SECONDS_OF_SILENCE = 60
_CONFIG = "YAML file with any of these parameters by name, positional ones too; what is typed beside it wins"


@dataclass(frozen=True)
class FunctionCommand:
    """A command whose parameters are those of a function.

    Attributes:
        function: a parameter that may be positional is an argument of the command, which may be left out where it has a
            default; a keyword-only one is an option. Annotations give the types, the docstring's ``Args`` the help. A
            ``bool`` is a flag, and a ``Sequence`` takes several words.
        example: a command line that the help shows.
        groups: heading of the help to the first option under it; an option belongs to the heading before it.
    """

    function: Callable[..., object]
    example: str
    groups: Mapping[str, str] = field(default_factory=dict)

    def parser(self, name: str) -> ArgumentParser:
        """The parser of ``dpp NAME``, which raises :class:`argparse.ArgumentError` in place of leaving the process."""
        parser = ArgumentParser(
            f"dpp {name}",
            usage=self._usage(name),
            description=self.description(),
            epilog=f"example:\n  {self.example}",
            formatter_class=HelpFormatter,
            exit_on_error=False,
            allow_abbrev=False,
        )
        parser.add_argument("--config", action="config", help=_CONFIG)
        self.add_parameters(parser)
        return parser

    def description(self) -> str:
        """What the function's docstring says before its ``Args``."""
        documented = parse_docstring(inspect.getdoc(self.function) or "")
        return _plain("\n\n".join(filter(None, [documented.short_description, documented.long_description])))

    def add_parameters(self, parser: ArgumentParser) -> None:
        """Add the function's parameters to a parser, which may have others too."""
        documented = parse_docstring(inspect.getdoc(self.function) or "")
        help_of = {parameter.arg_name: _plain(parameter.description or "") for parameter in documented.params}
        titles = {first: title for title, first in self.groups.items()}
        types = get_type_hints(self.function)
        group: Any = parser
        for parameter in inspect.signature(self.function).parameters.values():
            if parameter.name in titles:
                group = parser.add_argument_group(titles[parameter.name])
            _add_argument(group, parameter, types[parameter.name], help_of[parameter.name])

    def run(self, arguments: Sequence[str]) -> int:
        """Parse the command line, call the function, and say in one line what went wrong.

        Args:
            arguments: the command line from the command's name on.

        Returns:
            The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
        """
        name, words = arguments[0], list(arguments[1:])
        parser, words = self.parser(name), _configs_first(self.join_lists(words))
        try:
            _check_configs(words)
            refuse_repeated(read_settings(parser, words))
            options = parser.parse_args(words)
        except SystemExit as stop:  # after --help and --print_config
            return stop.code if isinstance(stop.code, int) else USAGE_ERROR
        except UsageError as error:
            say(f"dpp {name}: error: {error}")
            return USAGE_ERROR
        except ArgumentError as error:
            say(f"dpp {name}: error: {explain(error, parser, words)}")
            return USAGE_ERROR
        try:
            parameters = inspect.signature(self.function).parameters
            given = {name: options.get(name, parameter.default) for name, parameter in parameters.items()}
            self.function(**expand_home(given))
        except BrokenPipeError:  # the reader of the output has gone, which is no failure
            raise
        except Exception as error:
            described = describe(error)
            if described is None:
                raise
            message, code = described
            say(f"dpp {name}: {'error' if code == USAGE_ERROR else 'failed'}: {message}")
            return code
        return DONE

    def _usage(self, name: str) -> str:
        """Arguments and required options; the help lists the others."""
        words, types = [], get_type_hints(self.function)
        for parameter in inspect.signature(self.function).parameters.values():
            metavar, required = _metavar(parameter.name, types[parameter.name]), parameter.default is parameter.empty
            if parameter.kind is not parameter.KEYWORD_ONLY:
                words.append(metavar if required else f"[{metavar}]")
            elif required:
                words.append(f"--{parameter.name} {metavar}")
        return " ".join(["dpp", name, *words, "[options]"])

    def join_lists(self, words: Sequence[str]) -> list[str]:
        """``--carry a b`` as ``--carry=["a", "b"]``: jsonargparse takes the items of a list in one word."""
        types = get_type_hints(self.function)
        lists = {f"--{name}" for name, kind in types.items() if get_origin(kind) is Sequence}
        joined: list[str] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            items = []
            while word in lists and rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            joined.append(f"{word}={_as_list(items)}" if items else word)
        return joined


def _as_list(items: list[str]) -> str:
    """The words as a list in YAML; those of ``[a, b]`` are one already."""
    text = " ".join(items)
    try:
        whole = text.startswith("[") and isinstance(yaml.safe_load(text), list)
    except yaml.YAMLError:  # a glob such as [ab]*.weight
        whole = False
    return text if whole else json.dumps(items)


def _configs_first(words: Sequence[str]) -> list[str]:
    """The words with config files before all others, since jsonargparse lets the last one win."""
    configs: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            word = f"{word}={rest.pop(0)}"
        (configs if word.startswith("--config=") else others).append(word)
    return [*configs, *others]


def _check_configs(words: Sequence[str]) -> None:
    """Refuse a config file that is not there, before what it should have held is missed.

    Raises:
        UsageError: with its name.
    """
    for file in (word.partition("=")[2] for word in words if word.startswith("--config=")):
        if not INLINE.search(file) and not Path(file).exists():
            raise UsageError(f"the config file {file!r} does not exist")


def _add_argument(group: Any, parameter: inspect.Parameter, kind: Any, text: str) -> None:
    """Add one parameter of a function to a parser or to a group of it."""
    name, default = parameter.name, parameter.default
    required, several = default is parameter.empty, get_origin(kind) is Sequence
    if parameter.kind is not parameter.KEYWORD_ONLY:
        item = get_args(kind)[0] if several else kind
        # argparse applies a default where the word is not typed, also over what a config file says
        nargs = {"nargs": "+"} if several else {} if required else {"nargs": "?", "default": SUPPRESS}
        text += "" if required else f" (default: {'null' if default is None else default})"
        group.add_argument(name, type=item, metavar=name.upper(), help=text, **nargs)
    elif kind is bool:
        group.add_argument(f"--{name}", action=ActionYesNo, default=default, help=text)
    else:
        given = {"required": True} if required else {"default": list(default) if several else default}
        group.add_argument(f"--{name}", type=kind, metavar=_metavar(name, kind), help=text, **given)


def _metavar(name: str, kind: Any) -> str:
    """How help and usage write the value of a parameter."""
    return f"{name.upper()} [{name.upper()} ...]" if get_origin(kind) is Sequence else name.upper()


def _plain(text: str) -> str:
    """A docstring as a terminal shows it."""
    return text.replace("``", "")


class HelpFormatter(DefaultHelpFormatter):
    """Help whose paragraphs are filled one by one, and whose indented lines stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = []
        for paragraph in text.split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith(" ") for line in lines):
                blocks.append(textwrap.indent(paragraph, indent))
            else:
                blocks.append(textwrap.fill(" ".join(lines), width, initial_indent=indent, subsequent_indent=indent))
        return "\n\n".join(blocks)


def say(text: str) -> None:
    """A message on standard error, whose lines hold nothing that a terminal would act on."""
    sys.stderr.write(f"{printable_lines(text)}\n")


class BytesDone:
    """Moves a bar on, and shows it as soon as there is something to show.

    Args:
        bar, task: of rich.
        action: what is being done.
    """

    def __init__(self, bar: Progress, task: TaskID, action: str) -> None:
        self._bar, self._task, self._action = bar, task, action
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """So many bytes are done, of so many."""
        self._show()
        self._bar.update(self._task, completed=done, total=total)

    def stage(self, text: str) -> None:
        """Show what is being tried beside the bar; in a log, where there is none, a line a minute."""
        self._show()
        self._bar.update(self._task, description=f"{self._action}: {text}")
        if not self._bar.console.is_terminal and time.monotonic() - self._told >= _SECONDS_OF_SILENCE:
            self._told = time.monotonic()
            say(f"{self._action}: {text}")

    def _show(self) -> None:
        if not self._bar.live.is_started:
            self._bar.start()


@contextmanager
def progress_bar(action: str) -> Iterator[BytesDone]:
    """A bar on the terminal with bytes a second, from the first of them on: what is refused before shows none.

    Args:
        action: what is being done, such as ``"pruning"``.

    Yields:
        To be called with the bytes done and the bytes in all.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    try:
        yield BytesDone(bar, bar.add_task(action, total=None), action)
    finally:
        if bar.live.is_started:  # rich would print an empty line where it was not
            bar.stop()
