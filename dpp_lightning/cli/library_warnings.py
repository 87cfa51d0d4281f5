"""The library's warnings on the command line: one line each, without the place in the code that raised them."""

from __future__ import annotations

import warnings
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def show_in_one_line() -> None:
    """Show this package's warnings as ``dpp: warning: TEXT`` in this process; those of others as they were shown."""
    others = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = category is UserWarning and _PACKAGE in Path(filename).parents
        return f"dpp: warning: {message}\n" if ours else others(message, category, filename, lineno, line)

    warnings.formatwarning = format_warning
