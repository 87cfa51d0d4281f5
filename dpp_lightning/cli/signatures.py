"""What a parser's type hints take: which classes they may name, whether a value fits, and how to say it in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from inspect import isclass
from pydoc import ErrorDuringImport, locate
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser, get_loader

_VALUES = (bool, int, float, complex, str, bytes, NoneType)  # types of values; any other class is chosen by its name

_WORDS = {NoneType: "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts"}


def named_classes(typehint: Any) -> tuple[type, ...]:
    """The classes whose subclasses a setting may name: ``Callback`` of ``list[Callback] | Callback | None``, and
    ``Optimizer`` of ``Callable[[Iterable], Optimizer]``."""
    origin, arguments = get_origin(typehint), get_args(typehint)
    if origin in (Union, UnionType):
        return tuple(cls for argument in arguments for cls in named_classes(argument))
    if origin is Callable:
        return named_classes(arguments[-1]) if arguments else ()
    if isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return tuple(cls for argument in arguments for cls in named_classes(argument))
    plain = not isclass(typehint) or typehint in _VALUES or typehint.__module__ in ("builtins", "pathlib", "datetime")
    plain = plain or _is_tensor(typehint)
    return () if plain or origin is not None else (typehint,)


def _is_tensor(typehint: Any) -> bool:
    """Whether it is torch's tensor, which no config can name, such as a learning rate in Python may be."""
    return isclass(typehint) and (typehint.__module__, typehint.__name__) == ("torch", "Tensor")


def passed_later(typehint: Any) -> int:
    """How many leading arguments of a class the program gives itself: 1 for ``Callable[[Iterable], Optimizer]``."""
    for alternative in get_args(typehint) if get_origin(typehint) in (Union, UnionType) else (typehint,):
        if get_origin(alternative) is Callable and isinstance(get_args(alternative)[0], list):
            return len(get_args(alternative)[0])
    return 0


def takes_any_key(typehint: Any) -> bool:
    """Whether a value may be a mapping with keys of the user's choice."""
    if get_origin(typehint) in (Union, UnionType):
        return any(takes_any_key(argument) for argument in get_args(typehint))
    origin = get_origin(typehint) or typehint
    return origin is Any or (isclass(origin) and issubclass(origin, Mapping))


@cache
def class_parser(cls: type, skip: int = 0) -> ArgumentParser:
    """A parser of a class's own settings, less the first ``skip``."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={skip} if skip else set())
    return parser


def find_class(bases: tuple[type, ...], name: str) -> type | None:
    """The class that a name or import path stands for, None where there is none."""
    if "." not in name:
        return next((cls for cls in subclasses(bases) if cls.__name__ == name), None)
    try:
        imported = locate(name)
    except ErrorDuringImport:
        return None
    return imported if isclass(imported) and issubclass(imported, bases) else None


def subclasses(bases: tuple[type, ...]) -> Iterator[type]:
    """The classes themselves and all imported ones derived from them, outermost first."""
    waiting, seen = list(bases), set[type]()
    while waiting:
        cls = waiting.pop(0)
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += cls.__subclasses__()


def load(value: str | None) -> Any:
    """A value's text as the parser reads it: numbers, lists and mappings in YAML, else the text."""
    try:
        return value if value is None else get_loader("yaml")(value)
    except Exception:  # no YAML: then it is text
        return value


def accepts(typehint: Any, value: str) -> bool:
    """Whether the parser takes a value, given as text, for this type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=typehint)
    try:
        parser.parse_args([f"--value={value}"])
    except Exception:  # jsonargparse lets errors of several kinds through
        return False
    return True


def literals(typehint: Any) -> list[str]:
    """The words that a type names as choices."""
    if get_origin(typehint) is Literal:
        return [str(choice) for choice in get_args(typehint)]
    if get_origin(typehint) in (Union, UnionType):
        return list(dict.fromkeys(choice for argument in get_args(typehint) for choice in literals(argument)))
    return []


def describe_type(typehint: Any) -> str:
    """A type in words, such as ``a whole number or null``."""
    origin, arguments = get_origin(typehint), get_args(typehint)
    if origin in (Union, UnionType):
        choices = literals(typehint)
        others = [describe_type(a) for a in arguments if get_origin(a) is not Literal and not _is_tensor(a)]
        return " or ".join(dict.fromkeys(([f"one of {', '.join(choices)}"] if choices else []) + others))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is Callable:
        return describe_type(arguments[-1]) if arguments else "a function"
    if isclass(origin) and issubclass(origin, Mapping):
        return "a mapping"
    if isclass(origin) and issubclass(origin, Iterable):
        inner = dict.fromkeys(describe_type(argument) for argument in arguments if argument is not Ellipsis)
        return f"a list of {' or '.join(_PLURALS.get(word, word) for word in inner)}" if inner else "a list"
    return _WORDS.get(typehint, f"a {getattr(typehint, '__name__', typehint)}")
