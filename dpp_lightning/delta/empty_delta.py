"""Deltas that change nothing, all of their kept entries 0 or none kept: without a fault, but hardly what is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

from dpp_lightning.delta.contents import DeltaContents, SparseTensor


def warning_if_empty(contents: DeltaContents, what: str) -> DeltaContents:
    """The same delta, which warns once its tensors have been read if none of them changes a base.

    Args:
        contents: the delta; what it stores dense counts as a change.
        what: the delta, as the message begins, such as its folder.
    """

    def tensors() -> Iterator[tuple[str, SparseTensor]]:
        changes = bool(contents.carried or contents.new_rows)
        for name, tensor in contents.tensors():
            changes = changes or tensor.changes_something
            yield name, tensor
        if not changes:
            _warn(contents, what)

    return replace(contents, tensors=tensors)


def warn_if_empty(contents: DeltaContents, what: str) -> None:
    """Warn of a delta in memory that changes nothing; arguments as :func:`warning_if_empty`."""
    if not contents.carried and not contents.new_rows and not any(t.changes_something for _, t in contents.tensors()):
        _warn(contents, what)


def _warn(contents: DeltaContents, what: str) -> None:
    warnings.warn(
        f"{what} changes nothing: none of its {len(contents.table)} tensors has a kept entry other than 0: base "
        "plus delta is the base. Was it pruned at too high a rate, or of two equal models?",
        stacklevel=4,
    )
