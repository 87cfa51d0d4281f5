"""``~`` in what was given: a shell expands it only at the start of a word, not in ``--output=~/x`` or in a file."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import Namespace


def expand_home(value: Any) -> Any:
    """The value with every text that begins with ``~/`` as a path below the home directory.

    Args:
        value: a text, or lists, mappings and configs with texts in them; what is anything else stays as it is.

    Returns:
        Of a config the object itself, changed; else a new value.
    """
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith(("~/", "~\\")) else value
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            setattr(value, key, expand_home(inner))
        return value
    if isinstance(value, dict):
        return {key: expand_home(inner) for key, inner in value.items()}
    return [expand_home(inner) for inner in value] if isinstance(value, list) else value
