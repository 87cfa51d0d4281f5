"""What a delta says of its size, compared with what it holds before any of that is decoded."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import Tensor

from dpp_lightning.delta.coding.limits import most_tensors
from dpp_lightning.delta.contents import Table


def check_promise(entries: int, table: Table, dense: Iterable[Tensor], stored: int) -> None:
    """Compare the number of entries and of tensors.

    Args:
        entries: of the whole fine-tuned model, as the description has it.
        table: name and shape of every pruned tensor.
        dense: carried tensors and new rows.
        stored: bytes of all tensors in the model file.

    Raises:
        ValueError: the tensors have more entries than the model, or there are more than so few bytes can be about.
    """
    held = sum(prod(shape) for _, shape in table) + sum(tensor.numel() for tensor in dense)
    if held > entries:
        raise ValueError(
            f"a delta whose tensors have {held:,} entries, of a model that has {entries:,}: they are not of one model"
        )
    if len(table) > most_tensors(stored):
        raise ValueError(
            f"a delta of {len(table):,} tensors in {stored:,} bytes, where {most_tensors(stored):,} are the most: "
            "prune at a lower rate, or fewer tensors"
        )
