"""One line for a command line or config that the parser refuses: what is wrong, where it stands, what was meant.

jsonargparse answers a misspelled key of a nested class with every type that the value might have had. Here every
setting is followed through the parser's signatures instead, to the first key, class or value that they do not know.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from inspect import isabstract
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from dpp_lightning.cli.given_settings import Setting, read_settings
from dpp_lightning.cli.packaged_configs import UsageError, nearest
from dpp_lightning.cli.signatures import (
    accepts,
    class_parser,
    describe_type,
    find_class,
    literals,
    load,
    named_classes,
    passed_later,
    subclasses,
    takes_any_key,
)

Keys = tuple[str | int, ...]

_FAULTS_SHOWN, _NAMES_SHOWN = 3, 8


def explain(error: BaseException | str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What is wrong with a command line, in one line.

    Args:
        error: what the parser raised or said; it is shortened where no fault is found.
        parser: a parser of jsonargparse, LightningCLI's of one command or one made from a function's signature.
        arguments: what was parsed, behind the command's name, config names already resolved to paths.

    Returns:
        Where the fault is (the option, or the file, line and key), what it is, and the nearest known name.
    """
    try:
        faults = find_faults(parser, arguments)
    except UsageError as unreadable:
        return str(unreadable)
    except Exception:  # a signature that cannot be read must not hide what the parser said
        faults = []
    return "; ".join(faults[:_FAULTS_SHOWN]) if faults else shorten(str(error))


def find_faults(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """A line for every setting that the signatures do not take; where there is none, for every one that is missing.

    Raises:
        UsageError: a config file that is no YAML, or holds a key twice.
    """
    checker = _Checker(parser)
    faults = [fault for setting in read_settings(parser, arguments) if (fault := checker.fault(setting))]
    return faults or list(checker.missing())


def shorten(message: str) -> str:
    """An error of jsonargparse in one line: the keys that lead to the fault, and the innermost of the first reasons.

    A value that fits none of several types has a list of reasons, one for each type, and a reason may be such a list.
    """
    keys = ".".join(re.findall(r'Parser key "([^"]*)"', message))
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = lines[lines.index("Errors:") + 1 :] if "Errors:" in lines else []
    heading = re.compile("Errors:|Subtypes: |.*:$|.*Union subtypes$")
    innermost = next((reason for reason in reasons if not heading.match(reason)), None)
    text = innermost or " ".join(re.sub(r'Parser key "[^"]*":', "", message).split())
    return f"{keys}: {text.removeprefix('- ')}" if keys else text


class _Checker:
    """Follows settings through signatures, and remembers which class was chosen under which keys.

    Args:
        parser: of the command.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self._positional = [action for action in parser._actions if not action.option_strings]
        self._classes: dict[Keys, tuple[type, int]] = {}  # with the number of arguments that the program gives
        self._unknown_classes: set[Keys] = set()
        self._unknown_keys: set[Keys] = set()
        self._lengths: dict[Keys, int] = {}  # of lists of classes
        self._given: set[Keys] = set()

    def fault(self, setting: Setting) -> str | None:
        """What is wrong with a setting, or None."""
        if any(setting.keys[:n] in self._unknown_keys for n in range(1, len(setting.keys) + 1)):
            return None  # reported already
        if setting.keys:
            return self._follow(setting, self._parser, (), setting.keys, "")
        return self._positional_fault(setting)

    def _positional_fault(self, setting: Setting) -> str | None:
        """An argument without an option, where the command takes none or no more."""
        if self._positional:
            several = self._positional[0].nargs in ("+", "*")
            action = self._positional[0] if several else self._positional.pop(0)
            self._given.add((action.dest,))
            return _value_fault(setting, action)
        if () in self._unknown_keys:
            return None
        self._unknown_keys.add(())
        config = str(setting.value).endswith((".yaml", ".yml"))
        cure = f": did you mean --config {setting.value}?" if config else f" ({self._help('--help')} lists the options)"
        return f"the argument {setting.value} is not expected{cure}"

    def missing(self) -> Iterator[str]:
        """The required settings that were not given, of the command and of every class that was chosen."""
        levels: list[tuple[Keys, Any, str]] = [((), self._parser, self._help(""))]
        levels += [(keys, class_parser(*chosen), chosen[0].__name__) for keys, chosen in self._classes.items()]
        for keys, parser, owner in levels:
            for action in parser._actions if keys[-1:] != ("help",) else ():
                if action.required and (*keys, *action.dest.split(".")) not in self._given:
                    option = action.option_strings or keys
                    name = f"--{_option((*keys, action.dest))}" if option else str(action.metavar or action.dest)
                    yield f"{name} is missing: {owner} needs it"

    def _follow(self, setting: Setting, parser: Any, base: Keys, rest: Keys, owner: str) -> str | None:
        """Follow a setting through one signature.

        Args:
            setting: the whole of it.
            parser: the command's, or one of a class's own settings.
            base: the keys that led to this signature.
            rest: the keys that are left.
            owner: name of the class; empty for the command.
        """
        actions = _actions(parser, bool(setting.option))
        for depth in range(1, len(rest) + 1):
            name = ".".join(map(str, rest[:depth]))
            below = any(dest.startswith(f"{name}.") and not dest.endswith(".help") for dest in actions)
            below = below or ".".join(map(str, rest[: depth + 1])) in actions
            if name in actions and (depth == len(rest) or not below):
                return self._arrive(setting, actions[name], (*base, *rest[:depth]), rest[depth:])
            if name not in actions and not below:
                siblings = rest[: depth - 1]
                prefix = "".join(f"{key}." for key in siblings)
                known = {dest.removeprefix(prefix).split(".")[0] for dest in actions if dest.startswith(prefix)}
                return self._unknown_key(setting, rest[depth - 1 :], known, owner, base)
        return None

    def _arrive(self, setting: Setting, action: Any, keys: Keys, rest: Keys) -> str | None:
        """Follow a setting from a parser's action on, into a class or to its value."""
        self._given.add(keys)
        typehint = getattr(action, "_typehint", None)
        bases = named_classes(typehint)
        if bases:
            return self._enter(setting, action, bases, *self._element(setting, keys, rest))
        if not rest:
            return _value_fault(setting, action)
        if typehint is None or takes_any_key(typehint):
            return None
        name = Setting(keys, None).dotted
        return f"{_where(setting)}: {name} is {describe_type(typehint)} and has no settings of its own"

    def _element(self, setting: Setting, keys: Keys, rest: Keys) -> tuple[Keys, Keys]:
        """Where a class is held: under the keys, or in a list under a position, which options mean the last of."""
        if setting.appended:
            self._lengths[keys] = self._lengths.get(keys, 0) + 1
        if rest and isinstance(rest[0], int):
            self._lengths[keys] = max(self._lengths.get(keys, 0), rest[0] + 1)
            return (*keys, rest[0]), rest[1:]
        if self._lengths.get(keys) and (rest or setting.appended):
            return (*keys, self._lengths[keys] - 1), rest
        return keys, rest

    def _enter(self, setting: Setting, action: Any, bases: tuple[type, ...], keys: Keys, rest: Keys) -> str | None:
        """Choose the class that a setting names, or follow the setting into the class chosen before."""
        if not rest:
            return self._choose(setting, action, bases, keys)
        if keys in self._unknown_classes or rest[0] == "dict_kwargs":
            return None
        later = passed_later(action._typehint)
        if keys not in self._classes:
            default = _default_class(action, bases)
            if default is None and takes_any_key(action._typehint):
                return None
            if default is None:
                return f"{_where(setting)} is a setting of no class: choose one with --{_option(keys)}"
            self._classes[keys] = default, later
        cls = self._classes[keys][0]
        return self._follow(setting, class_parser(cls, later), keys, rest, cls.__name__)

    def _choose(self, setting: Setting, action: Any, bases: tuple[type, ...], keys: Keys) -> str | None:
        """Note the class that a setting names; the fault where no class has that name."""
        value = load(setting.value)
        names = value if isinstance(value, list) else [value]
        if isinstance(value, list):  # it takes the place of an earlier one
            self._forget(keys)
            self._lengths[keys] = len(value)
        for index, name in enumerate(names):
            if not isinstance(name, str) or Path(name).is_file() or setting.value is None:
                continue
            held = (*keys, index) if isinstance(value, list) else keys
            self._forget(held)
            cls = find_class(bases, name)
            if cls is not None:
                self._classes[held] = cls, passed_later(action._typehint)
            elif not accepts(action._typehint, str(setting.value)):
                self._unknown_classes.add(held)
                return _unknown_class(setting, name, bases, literals(action._typehint))
        return None if isinstance(value, (str, list, dict)) else _value_fault(setting, action)

    def _forget(self, keys: Keys) -> None:
        """What was chosen and given for another class before does not count."""
        n = len(keys)
        self._classes = {k: chosen for k, chosen in self._classes.items() if k[:n] != keys}
        self._unknown_classes = {k for k in self._unknown_classes if k[:n] != keys}

    def _unknown_key(self, setting: Setting, rest: Keys, known: Iterable[str], owner: str, base: Keys) -> str:
        """A key that is none of the known ones; ``rest`` begins with it."""
        whose = f"not a setting of {owner}" if owner else "not an option" if setting.option else "not a setting"
        before = setting.keys[: -len(rest)]
        self._unknown_keys.add((*before, rest[0]))
        near = nearest(str(rest[0]), known)
        if near is not None:
            meant = f"--{_option((*before, near, *rest[1:]))}" if setting.option else near
            return f"{_where(setting)} is {whose}: did you mean {meant}?"
        names = sorted(set(known))
        if owner and len(names) <= _NAMES_SHOWN:
            return f"{_where(setting)} is {whose}; it has {', '.join(names)}"
        lists = self._help(f"--{_option(base)}.help {owner}" if owner else "--help")
        return f"{_where(setting)} is {whose} ({lists} lists them)"

    def _help(self, option: str) -> str:
        return f"{self._parser.prog} {option}".strip()


def _actions(parser: argparse.ArgumentParser, on_command_line: bool) -> dict[str, argparse.Action]:
    """A parser's actions by the name a user writes: options on a command line, keys in a file."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if on_command_line or (not action.dest.endswith("help") and action.dest not in ("config", "print_config")):
            names = [option.lstrip("-").rstrip("+") for option in action.option_strings if option.startswith("--")]
            actions |= dict.fromkeys(names if on_command_line else [action.dest], action)
    return actions


def _default_class(action: Any, bases: tuple[type, ...]) -> type | None:
    """The class that is meant where none is named: the default's, or the only one that can be made."""
    default = action.default
    path = default.get("class_path") if hasattr(default, "get") else default
    if isinstance(path, str) and (cls := find_class(bases, path)):
        return cls
    return bases[0] if len(bases) == 1 and hasattr(bases[0], "__dataclass_fields__") else None


def _value_fault(setting: Setting, action: Any) -> str | None:
    """A value that an action does not take, or that is missing."""
    if setting.value is None:
        return f"{_where(setting)} needs a value" if action.nargs is None else None
    typehint = bool if isinstance(action, ActionYesNo) else getattr(action, "_typehint", None)
    if typehint is None or accepts(typehint, setting.value):
        return None
    choices = literals(typehint)
    near = nearest(setting.value, choices)
    cure = f": did you mean {near}?" if near else ""
    given = f": {setting.value}" if setting.file else f" {setting.value}"
    return f"{_where(setting)}{given} is not {describe_type(typehint)}{cure}"


def _unknown_class(setting: Setting, name: str, bases: tuple[type, ...], choices: Sequence[str]) -> str:
    """A name that is neither one of the choices nor that of a class derived from the bases."""
    known = [cls.__name__ for cls in subclasses(bases) if not isabstract(cls) and not cls.__name__.startswith("_")]
    near = nearest(name.rpartition(".")[2], [*choices, *known])
    kinds = [f"one of {', '.join(choices)}"] if choices else []
    kinds += [f"a known {kind}" for kind in dict.fromkeys(cls.__name__ for cls in bases)]
    given = f" {name}" if setting.option else f": {name}"
    cure = f"did you mean {near}?" if near else "give a class by its import path, such as package.module.Name"
    return f"{_where(setting)}{given} is not {' or '.join(kinds)}: {cure}"


def _where(setting: Setting) -> str:
    if not setting.keys:
        return "the argument"
    return setting.option or f"{setting.file}: {setting.dotted}"


def _option(keys: Iterable[str | int]) -> str:
    """Keys as an option spells them, without positions in lists."""
    return ".".join(key for key in keys if isinstance(key, str))
