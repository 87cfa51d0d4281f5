"""Text from outside, such as names in files and paths that were typed: what is refused, and how the rest is shown.

A text from outside is never markup, an escape sequence or code: :func:`printable` writes it for a line on a terminal,
:func:`markdown_text` and :func:`markdown_code` for Markdown.
"""

from __future__ import annotations

import re
from pathlib import Path

# Control characters, line and paragraph separators, what turns the direction of a line, half characters (surrogates).
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
# Characters without width: joiners, marks of direction, fillers, tags.
_INVISIBLE = "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u2065\u206a-\u206f\u3164\ufeff"
_INVISIBLE += "\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
_CONTROLS, _HIDDEN = re.compile(f"[{_CONTROL}]"), re.compile(f"[{_CONTROL}{_INVISIBLE}]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>&|~#!]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word is none
_TASK_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")  # Windows drops a dot at the end of a folder


def read_utf8(path: Path) -> str:
    """A file's text, which must be UTF-8; a byte order mark at its start is left out.

    Raises:
        ValueError: it is not, with the first byte that says so.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ValueError(
            f"{path} is no text in UTF-8: its byte {error.start + 1} is 0x{wrong:02x}; save it in UTF-8"
        ) from error


def has_controls(text: str) -> bool:
    """Whether a text has control characters, separators of lines, characters that turn the direction of a line, or half
    characters (surrogates)."""
    return _CONTROLS.search(text) is not None


def check_name(name: str) -> str:
    """A tensor's name as it is, if it is safe to print and, should anyone use it so, as a part of a path.

    Raises:
        ValueError: control characters, invisible ones, half characters (surrogates), a leading ``/`` or a part ``..``.
    """
    parts = name.replace("\\", "/").split("/")
    if _HIDDEN.search(name) or ".." in parts or (len(parts) > 1 and not parts[0]):
        raise ValueError(
            f"a tensor cannot be named {name!r}: no control characters, invisible ones, leading '/' or parts '..' there"
        )
    return name


def is_task_name(name: str) -> bool:
    """Whether a name of letters, digits, ``_``, ``-`` and ``.`` can begin names of files and of tensors."""
    return _TASK_NAME.fullmatch(name) is not None


def printable(text: str) -> str:
    """A text in one line, in which line breaks, escape sequences and invisible characters are written as in Python's
    strings."""
    return "".join(c if c.isprintable() and not _HIDDEN.match(c) else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """A text of several lines, each :func:`printable`."""
    return "\n".join(map(printable, text.split("\n")))


def markdown_text(text: str) -> str:
    """A text in a paragraph or a cell of a table in Markdown, where it is neither markup nor HTML."""
    return _MARKDOWN.sub(lambda found: f"\\{found.group()}", printable(text))


def markdown_code(text: str) -> str:
    """A text as code in a paragraph or a cell of a table in Markdown."""
    shown = printable(text).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
