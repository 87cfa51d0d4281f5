"""Which rows of a batch use which delta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[str, str | None]  # a delta's name, and the task of a merged one


class BatchRows:
    """The rows of a mixed batch.

    Args:
        keys: of each row its delta; None for the base.

    Attributes:
        size: number of rows.
        keys: the distinct keys, None left out, in the order of their first rows.
        covered: every row has a key.
    """

    def __init__(self, keys: Sequence[Key | None]) -> None:
        self.size = len(keys)
        by_key: dict[Key, list[int]] = {}
        for row, key in enumerate(keys):
            if key is not None:
                by_key.setdefault(key, []).append(row)
        self.keys = list(by_key)
        self.covered = None not in keys
        self._rows = [_as_slice(rows) for rows in by_key.values()]
        self._tensor_of_row = torch.tensor([0 if key is None else 1 + self.keys.index(key) for key in keys])

    def of(self, delta: int) -> slice | Tensor:
        """The rows of one delta, which index the first dimension of a batch's tensors."""
        return self._rows[delta]

    def stacked(self, of_deltas: Sequence[Tensor | None], base: Tensor) -> Tensor:
        """One tensor a row, that of its delta, or the base's where that is None.

        Args:
            of_deltas: of each delta, of the base's shape.
            base: any shape.

        Returns:
            Shape (rows of the batch, *the base's).
        """
        tensors = torch.stack([base.detach(), *(base.detach() if v is None else v for v in of_deltas)])
        return tensors[self._tensor_of_row.to(base.device)]


def _as_slice(rows: list[int]) -> slice | Tensor:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows)
