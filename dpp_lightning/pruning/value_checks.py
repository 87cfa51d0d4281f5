"""Whether the values of a base and a fine-tuned model give a delta at all: something changed, and all is finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from dpp_lightning.tensors.finite import count_non_finite, is_finite

_SHOWN = 4


class ValueChecks:
    """What is checked of the values of two models that are matched. Of tensors in shards every check is a collective.

    Checked are both sides of the tensors that are pruned, each read once, and the fine-tuned values that are stored
    dense; a tensor that both have alike, or that is left to the base, may hold anything.

    Args:
        base, finetuned: canonical name to tensor.
        fates: what becomes of each fine-tuned tensor: ``prune``, ``carry`` or ``revert``.
        unchanged: names of the tensors that are equal on both sides.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        finetuned: Mapping[str, Tensor],
        fates: Mapping[str, str],
        unchanged: Iterable[str],
    ) -> None:
        self._base, self._finetuned = base, finetuned
        same = set(unchanged)
        self._all = sorted(fates)
        self._by_fate = {
            fate: [name for name in self._all if fates[name] == fate and name not in same]
            for fate in ("prune", "carry", "revert")
        }
        self._in_scope = sum(fate == "prune" for fate in fates.values())
        self._finite: set[str] = set()

    def nothing_changed(self) -> str | None:
        """Why these models have no delta: they are equal, or differ only where the base is kept. Else None."""
        pruned, carried, reverted = self._by_fate.values()
        if pruned or carried:
            return None
        if not reverted:
            return f"base and fine-tuned model are equal in all {len(self._all)} tensors"
        return (
            f"base and fine-tuned model are equal in all {self._in_scope} tensors in scope, and the "
            f"{len(reverted)} that differ ({_first(reverted)}) are reverted to the base"
        )

    def check_changed(self) -> None:
        """Refuse models that have no delta, and warn where nothing of it is pruned.

        Raises:
            ValueError: as :meth:`nothing_changed` says.
        """
        if reason := self.nothing_changed():
            raise ValueError(f"{reason}: there is nothing to prune. Is FINETUNED the right folder?")
        if not self._by_fate["prune"]:
            carried = self._by_fate["carry"]
            warnings.warn(
                f"nothing is pruned: base and fine-tuned model are equal in all {self._in_scope} tensors in scope; the "
                f"delta consists of {len(carried)} tensors stored dense ({_first(carried)})",
                stacklevel=3,
            )

    def check_finite(self, name: str) -> None:
        """Check one pruned tensor, both sides, if it was not checked before.

        Raises:
            ValueError: NaN or infinity; the message names all such tensors of both models, with counts.
        """
        if name not in self._finite:
            if not (is_finite(self._finetuned[name]) and is_finite(self._base_rows(name))):
                raise ValueError(self.not_finite())
            self._finite.add(name)

    def check_carried_finite(self) -> None:
        """Check what is stored dense; in it -infinity may be, as masks have it.

        Raises:
            ValueError: as :meth:`check_finite`.
        """
        if any(_fault(self._finetuned[name], mask=True) for name in self._by_fate["carry"]):
            raise ValueError(self.not_finite())

    def not_finite(self) -> str | None:
        """One line that names the tensors with NaN or infinity and how many there are; None where all is finite."""
        pruned, carried, _ = self._by_fate.values()
        both: dict[str, dict[str, str]] = {"the base": {}, "the fine-tuned model": {}}
        for name in pruned:
            both["the base"][name] = _fault(self._base_rows(name))
            both["the fine-tuned model"][name] = _fault(self._finetuned[name])
        for name in carried:
            both["the fine-tuned model"][name] = _fault(self._finetuned[name], mask=True)
        sides = []
        for side, faults in both.items():
            found = [f"{name} ({fault})" for name, fault in faults.items() if fault]
            if found:
                sides.append(f"{side} is not finite in {len(found)} of {len(faults)} tensors: {_first(found)}")
        if not sides:
            return None
        diverged = sides[-1].startswith("the fine-tuned")
        cure = "Did the training diverge? Take an earlier checkpoint" if diverged else "Take a base that is whole"
        return f"{'; '.join(sides)}. {cure}"

    def _base_rows(self, name: str) -> Tensor:
        """The base's tensor, of a longer vocabulary the rows in common."""
        base, finetuned = self._base[name], self._finetuned[name]
        return base if base.shape == finetuned.shape else base[: len(finetuned)]


def _fault(tensor: Tensor, *, mask: bool = False) -> str:
    """What is not finite in a tensor; nothing where all is, or where a mask has its -infinity."""
    nan, positive, negative = count_non_finite(tensor)
    if mask and not nan and not positive:
        return ""
    counts = {"NaN": nan, "infinite": positive + negative}
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
