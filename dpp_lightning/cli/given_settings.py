"""What a command line and its config files set, one by one and each with where it stands; repetitions are refused.

The parser itself merges all sources, so that of a setting given twice the last one wins without a word.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpp_lightning.cli.packaged_configs import UsageError
from dpp_lightning.storage.safe_text import read_utf8

INLINE = re.compile(r"[\n{]")  # of a --config whose value is YAML itself and no file
_OPTION = re.compile(r"--?[A-Za-z]")
_SPECIAL = re.compile(r"^$|[^\w.+-]")


@dataclass(frozen=True)
class Setting:
    """One value that the user wrote.

    Attributes:
        keys: the keys that lead to it, from the outermost; an int is a position in a list. ``init_args`` is left out,
            since options leave it out too. Empty for an argument without an option.
        value: as text, lists and mappings as JSON; None where an option stands without a value.
        option: as typed, without its value; empty for a setting of a file.
        file: the config file and line; empty for an option.
        appended: an option such as ``--trainer.callbacks+``, which lengthens a list.
    """

    keys: tuple[str | int, ...]
    value: str | None
    option: str = ""
    file: str = ""
    appended: bool = False

    @property
    def dotted(self) -> str:
        """The keys in one word, such as ``trainer.callbacks[0].monitor``."""
        return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys).lstrip(".")


def read_settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[Setting]:
    """All settings in the order in which they take effect, those of config files where ``--config`` stands.

    Args:
        parser: of the command; it says how many values an option takes.
        arguments: behind the command's name, config names already resolved to paths.

    Raises:
        UsageError: a config file that is no YAML, or holds a key twice; with file and line.
    """
    settings: list[Setting] = []
    for option, values in _options(parser, arguments):
        action = parser._option_string_actions.get(option)
        known = action if action is not None and action.dest != argparse.SUPPRESS else None
        name = known.dest if known is not None else option.lstrip("-").rstrip("+")
        keys = tuple(name.split(".")) if option else ()
        if keys == ("config",):
            settings += [setting for value in values for setting in _read_config(value)]
            continue
        value = None if not values else values[0] if len(values) == 1 else json.dumps(values)
        setting = Setting(_without_init_args(keys), value, option, appended=option.endswith("+"))
        settings.append(setting)
        if value is not None and value[:1] in ("[", "{") and not setting.appended:
            settings += _read_value(setting)
    return settings


def refuse_repeated(settings: Sequence[Setting]) -> None:
    """Refuse an option that a command line has twice.

    A list grows by ``--trainer.callbacks+=X``, and the options of X may follow each X anew.

    Raises:
        UsageError: with the option and both values.
    """
    given: dict[tuple[Any, ...], Setting] = {}
    appended = 0
    for setting in settings:
        if not setting.option:
            continue
        if setting.appended:
            appended += 1
            continue
        earlier = given.setdefault((setting.keys, appended), setting)
        if earlier is not setting:
            values = "" if setting.value is None else f", {_words(earlier)} and {_words(setting)}"
            raise UsageError(f"{setting.option} is given twice{values}: keep one")


def _words(setting: Setting) -> str:
    """A value as it was typed, several words of one option too."""
    try:
        words = json.loads(str(setting.value))
    except ValueError:
        return str(setting.value)
    return " ".join(map(str, words)) if isinstance(words, list) else str(setting.value)


def _without_init_args(keys: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``model.init_args.task`` is ``model.task``, and ``model.class_path`` is ``model``."""
    kept = tuple(key for key in keys if key != "init_args")
    return kept[:-1] if kept[-1:] == ("class_path",) else kept


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with its values; an argument without an option comes with an empty one."""
    waiting = list(arguments)
    while waiting:
        token = waiting.pop(0)
        if not _OPTION.match(token):
            yield "", [token]
            continue
        option, equals, value = token.partition("=")
        if equals:
            yield option, [value]
            continue
        nargs = getattr(parser._option_string_actions.get(option), "nargs", None)
        most = {0: 0, "+": len(waiting), "*": len(waiting)}.get(nargs, nargs if isinstance(nargs, int) else 1)
        values: list[str] = []
        while waiting and len(values) < most and not _OPTION.match(waiting[0]):
            values.append(waiting.pop(0))
        yield option, values


def _read_config(value: str) -> Iterator[Setting]:
    """The settings of a config file or of YAML on the command line; of an address or a pipe, which are not read twice,
    none."""
    inline = INLINE.search(value)
    if not inline and not Path(value).is_file():
        return
    name = "--config" if inline else value
    try:
        loader = yaml.SafeLoader(value if inline else read_utf8(Path(value)))
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        document = loader.get_single_node()
        if document is not None:
            yield from _flatten(loader, document, (), name)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{name}{line} is no YAML: {error.problem or error.context}") from error
    finally:
        loader.dispose()


def _read_value(setting: Setting) -> list[Setting]:
    """The settings inside an option's value, where that is YAML with mappings."""
    loader = yaml.SafeLoader(str(setting.value))
    try:
        children = list(_flatten(loader, loader.get_single_node(), setting.keys, setting.option))
    except yaml.MarkedYAMLError:  # a word such as a glob
        return []
    finally:
        loader.dispose()
    return children if any(child.keys != setting.keys for child in children) else []


def _flatten(loader: yaml.SafeLoader, node: Any, keys: tuple[str | int, ...], name: str) -> Iterator[Setting]:
    where = f"{name}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode) and node.value:
        children: dict[Any, tuple[Any, Any]] = {}
        for key_node, child in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if key in children:
                first = children[key][0].start_mark.line + 1
                dotted = Setting((*keys, str(key)), None).dotted
                raise UsageError(f"{name} sets {dotted} twice, on lines {first} and {line}: keep one")
            children[key] = key_node, child
        # the class is known before its settings are looked at
        for key in sorted(children, key=lambda key: key != "class_path"):
            yield from _flatten_item(loader, *children[key], (*keys, key), name)
    elif isinstance(node, yaml.SequenceNode) and any(isinstance(child, yaml.MappingNode) for child in node.value):
        yield Setting(_without_init_args(keys), _text(loader, node), file=where)
        for index, child in enumerate(node.value):
            yield from _flatten(loader, child, (*keys, index), name)
    else:
        yield Setting(_without_init_args(keys), _text(loader, node), file=where)


def _flatten_item(
    loader: yaml.SafeLoader, key_node: Any, child: Any, keys: tuple[str | int, ...], name: str
) -> Iterator[Setting]:
    """One entry of a mapping; the line of a plain value is that of its key."""
    plain = not isinstance(child, yaml.CollectionNode) or not child.value
    if plain:
        line = key_node.start_mark.line + 1
        yield Setting(_without_init_args(keys), _text(loader, child), file=f"{name}, line {line}")
    else:
        yield from _flatten(loader, child, keys, name)


def _text(loader: yaml.SafeLoader, node: Any) -> str:
    """A value in one line of YAML, numbers spelled as they were."""
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_item(loader, child) for child in node.value)}]"
    return json.dumps(loader.construct_object(node, deep=True), default=str)


def _item(loader: yaml.SafeLoader, node: Any) -> str:
    if isinstance(node, yaml.ScalarNode) and (node.style or _SPECIAL.search(node.value)):
        return json.dumps(node.value)
    return _text(loader, node)
