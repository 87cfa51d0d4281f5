"""Two sets of tensors that change places, so that an interrupt never loses a value of either."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpp_lightning.tensors.names import NamedTensor


class Exchange:
    """Exchanges tensors of a module with others one by one, so that a copy of one tensor at a time is made.

    Args:
        pairs: canonical name to the module's tensor and the other one, of one shape and dtype.
    """

    def __init__(self, pairs: Mapping[str, tuple[NamedTensor, Tensor]]) -> None:
        self._pairs = pairs
        # names that have changed places; and of one that is about to, its values in the module, and whether the module
        # has the other's by now. Always set in one step.
        self._state: tuple[frozenset[str], tuple[str, Tensor, bool] | None] = (frozenset(), None)

    @property
    def names(self) -> list[str]:
        """Names of all pairs."""
        return list(self._pairs)

    def exchange(self, name: str) -> None:
        """The two tensors of a name change places; called again, they change back."""
        self._finish()
        self._state = self._state[0], (name, self._pairs[name][0].tensor.detach().clone(), False)
        self._finish()

    def put_back(self) -> None:
        """Every tensor where it was at first. Can be called again after an interrupt."""
        self._finish()
        for name in sorted(self._state[0]):
            self.exchange(name)

    @torch.no_grad()
    def _finish(self) -> None:
        """Complete the exchange that was begun, wherever it was interrupted."""
        exchanged, begun = self._state
        if begun is None:
            return
        name, values, in_module = begun
        named, other = self._pairs[name]
        if not in_module:
            tensor = named.tensor.detach()
            tensor.copy_(other)
            named.store(tensor)
            self._state = exchanged, (name, values, True)
        other.detach().copy_(values)
        self._state = exchanged ^ {name}, None
