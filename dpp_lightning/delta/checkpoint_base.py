"""Whether a model's files hold the base of a delta, without building the model."""

from __future__ import annotations

from pathlib import Path

from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.match_tensors import check_base, find_tensors
from dpp_lightning.storage.checkpoints import load_tensors
from dpp_lightning.tensors.flat_entries import gather_entries
from dpp_lightning.tensors.names import named_tensors


def check_checkpoint(base: str | Path, delta: DeltaReader, *, force: bool = False) -> None:
    """Refuse files that are not a delta's base. They are mapped, and one tensor of the delta is in memory at a time.

    Args:
        base: as in :func:`dpp_lightning.pruning.prune_checkpoints.prune_checkpoint`.
        delta: opened.
        force: only names and shapes are checked, and not the values.

    Raises:
        ValueError: another base, or tensors that are missing or of another shape.
    """
    tensors = {named.name: named.tensor for named in named_tensors(load_tensors(base))}
    found = find_tensors(delta.contents.shapes_in_base, tensors, str(base), delta.info, longer=True)
    if not force:
        held = (gather_entries(found[name], sparse.changed) for name, sparse in delta.contents.tensors())
        check_base(held, delta.contents, found, str(base))
