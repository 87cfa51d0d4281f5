"""What computes with a changed tensor where a mixed batch does not see it: other names of its memory, scripted code."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpp_lightning.serving.sparse_products import CannotMixError


class UnseenUses(TorchDispatchMode):
    """Refuses every kernel of torch that reads a changed tensor's memory while no function is being given its change.

    It sees what Python's own functions do not show, and takes a few microseconds a kernel: it is entered until all
    changed tensors have gone through one forward.

    Args:
        changed: names and tensors of the model.
        following: whether a function that takes a changed tensor is being computed now.

    Raises:
        CannotMixError: inside the block, with the tensor's name.
    """

    def __init__(self, changed: Iterable[tuple[str, Tensor]], following: Callable[[], bool]) -> None:
        super().__init__()
        held = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name) for name, t in changed if t.numel()]
        self._held = sorted(held)
        self._starts = [start for start, _, _ in self._held]
        self._following = following

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every kernel, with this mode switched off."""
        if not self._following():
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and (name := self._name_of(value)) is not None:
                    raise CannotMixError(
                        f"{name} is used by another name of its memory, or by code that is no Python, in {func}"
                    )
        return func(*args, **(kwargs or {}))

    def _name_of(self, tensor: Tensor) -> str | None:
        try:
            place = tensor.data_ptr()
        except RuntimeError:  # it has no memory of its own
            return None
        index = bisect_right(self._starts, place) - 1
        if index < 0 or not tensor.numel():
            return None
        _, end, name = self._held[index]
        return name if place < end else None
