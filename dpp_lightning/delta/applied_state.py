"""Which targets a delta is applied to, and what it overwrote in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.weak import WeakIdKeyDictionary

from dpp_lightning.delta.target import Values
from dpp_lightning.tensors.names import NamedTensor


class AppliedState:
    """The targets that a delta is applied to. Never changed: a delta takes another state in one step.

    A target that no longer exists takes its values with it.

    Args:
        records: for every target, each of its tensors to what was overwritten in it, by name: a tensor of a target may
            hold several of the model's files.
    """

    def __init__(self, records: tuple[WeakIdKeyDictionary, ...] = ()) -> None:
        self._records = records

    def __bool__(self) -> bool:
        """Whether there is a target."""
        return any(len(record) for record in self._records)

    def touches(self, named: Mapping[str, NamedTensor]) -> bool:
        """Whether any of these tensors is of one of the targets."""
        return any(name in record.get(n.owner, ()) for record in self._records for name, n in named.items())

    def originals(self, named: Mapping[str, NamedTensor]) -> dict[str, Values] | None:
        """What was overwritten in a target of these tensors, by name; None if it is not one of the targets."""
        for record in self._records:
            if all(name in record.get(n.owner, ()) for name, n in named.items()):
                return {name: record[n.owner][name] for name, n in named.items()}
        return None if named else {}

    def including(self, named: Mapping[str, NamedTensor], originals: Mapping[str, Values]) -> AppliedState:
        """These targets and one more."""
        record = WeakIdKeyDictionary()
        for name, n in named.items():
            record.setdefault(n.owner, {})[name] = originals[name]
        return AppliedState((*(held for held in self._records if len(held)), record))

    def without(self, named: Mapping[str, NamedTensor]) -> AppliedState:
        """These targets but for those that have any of these tensors."""
        owners = [n.owner for n in named.values()]
        return AppliedState(tuple(r for r in self._records if len(r) and not any(owner in r for owner in owners)))
