"""The packaged recipes: their names, texts and titles, and what ``--config NAME`` stands for. Standard library only."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

SUFFIX = ".yaml"


class UsageError(ValueError):
    """A command line or a config is wrong; the message is one line that says what and where, with the cure."""


def names() -> list[str]:
    """File names of the packaged configs, in alphabetical order."""
    return sorted(entry.name for entry in files("dpp_lightning.configs").iterdir() if entry.name.endswith(SUFFIX))


def path(name: str) -> Path:
    """The file of a packaged config, whose name may lack its ``.yaml``.

    Raises:
        UsageError: if no packaged config has that name. The message suggests the nearest.
    """
    packaged = names()
    for candidate in (name, name + SUFFIX):
        if candidate in packaged:
            return Path(str(files("dpp_lightning.configs").joinpath(candidate)))
    raise UsageError(f"no packaged config is named {name!r}{did_you_mean(name, packaged)} (dpp configs lists them)")


def read(name: str) -> str:
    """The text of a packaged config.

    Raises:
        UsageError: if no packaged config has that name. The message suggests the nearest.
    """
    return path(name).read_text(encoding="utf-8")


def tables() -> dict[str, Path]:
    """The files of the papers' tables, by the names that ``dpp reproduce`` takes."""
    entries = files("dpp_lightning.configs.papers").iterdir()
    paths = sorted(Path(str(entry)) for entry in entries if entry.name.endswith(SUFFIX))
    return {path.name.removesuffix(SUFFIX).replace("_", "-"): path for path in paths}


def title(name: str) -> str:
    """The first comment line of a packaged config without its ``#``; empty where it does not open with a comment."""
    first = next(iter(read(name).splitlines()), "")
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word nearest to ``word``, None where none is near; case, ``-`` for ``_`` and ``.yaml`` are forgiven."""
    by_spelling = {_spelling(name): name for name in known}
    near = get_close_matches(_spelling(word), by_spelling, n=1)
    return by_spelling[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``": did you mean X?"`` for the known word nearest to ``word``, else empty."""
    near = nearest(word, known)
    return f": did you mean {near}?" if near else ""


def _spelling(word: str) -> str:
    return word.lower().replace("-", "_").removesuffix(SUFFIX)


def resolve(value: str) -> str:
    """The value of ``--config``, with the name of a packaged config replaced by its path.

    A local file wins; inline YAML or JSON and addresses (``s3://...``) pass unchanged.

    Raises:
        UsageError: if the value is neither a file nor a packaged name. The message suggests the nearest packaged one.
    """
    if any(mark in value for mark in "\n:{"):
        return value
    local = Path(value)
    if local.exists() and not local.is_dir():  # a named pipe is welcome, a folder that happens to bear the name is not
        return value
    if local.name == value:
        try:
            return str(path(value))
        except UsageError as error:
            raise UsageError(f"no file here and {error}") from None
    raise UsageError(f"the config file {value!r} does not exist{did_you_mean(local.name, names())}")


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with the value of every ``-c X``, ``--config X`` and ``--config=X`` resolved.

    Raises:
        UsageError: if a value is neither a file nor a packaged name.
    """
    resolved: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if resolved and resolved[-1] in ("-c", "--config"):
            resolved.append(resolve(argument))
        elif equals and option in ("-c", "--config"):
            resolved.append(f"{option}={resolve(value)}")
        else:
            resolved.append(argument)
    return resolved
