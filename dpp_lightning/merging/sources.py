"""One delta as a merge reads it: from memory or a folder, tensor by tensor, checked against the base on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpp_lightning.delta.config_file import Table
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor
from dpp_lightning.delta.match_tensors import matched
from dpp_lightning.delta.reader import DeltaReader
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.delta.task_heads import check_tasks, task_names
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries
from dpp_lightning.tensors.names import match_names


@dataclass(frozen=True)
class MergeSource:
    """A delta to be merged.

    Attributes:
        task: its name.
        info: its description.
        table: canonical name and shape of every pruned tensor, in order.
        tensors: starts to read name and kept entries of one tensor after the other.
        carried, new_rows: canonical name to dense tensor.
        folder: where it lies, if it does.
    """

    task: str
    info: DeltaInfo
    table: Table
    tensors: Callable[[], Iterator[tuple[str, SparseTensor]]]
    carried: Mapping[str, Tensor]
    new_rows: Mapping[str, Tensor]
    folder: Path | None = None

    @classmethod
    def all(cls, deltas: Sequence[SparseDelta | DeltaReader], tasks: Sequence[str] | None) -> list[MergeSource]:
        """The deltas under their tasks' names; default the names of their folders.

        Raises:
            ValueError: no delta, names that do not fit, or a delta that is a merge with a head for each task.
        """
        if not deltas:
            raise ValueError("there is nothing to merge: give at least one delta")
        if tasks is not None and len(tasks) != len(deltas):
            raise ValueError(f"got {len(tasks)} task names for {len(deltas)} deltas: {', '.join(tasks)}")
        names = list(tasks or (_name(delta, place) for place, delta in enumerate(deltas)))
        check_tasks(names)
        for name, delta in zip(names, deltas, strict=True):
            if inner := task_names(delta.info):
                raise ValueError(f"{name} is a merge of {', '.join(inner)}: merge the deltas of single models at once")
        return [cls._of(delta, name) for name, delta in zip(names, deltas, strict=True)]

    @classmethod
    def _of(cls, delta: SparseDelta | DeltaReader, task: str) -> MergeSource:
        if isinstance(delta, DeltaReader):
            table, tensors, folder = delta.chunks.table, delta.tensors, delta.folder
            return cls(task, delta.info, table, tensors, delta.carried, delta.new_rows, folder)
        table = [(name, part.shape) for name, part in delta.tensors.items()]
        return cls(task, delta.info, table, lambda: iter(delta.tensors.items()), delta.carried, delta.new_rows)

    def names_in(self, base: Mapping[str, Tensor], where: str) -> dict[str, str]:
        """This delta's names of what is not carried, to the base's.

        Raises:
            ValueError: tensors that the base lacks or has in another shape, all in one message.
        """
        shapes: dict[str, tuple[int, ...] | None] = dict(self.table)
        shapes |= dict.fromkeys((*self.info.reverted, *self.info.unchanged))
        matched(shapes, base, where, self.info, longer=True)
        return match_names(shapes, base)

    def fits(self, base: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
        """Whether the first tensor with kept entries was pruned against this base: a wrong one is known at once."""
        check = EntriesHash()
        for name, part in self.tensors():
            check.update(gather_entries(base[names[name]], part.indices))
            if check.first:
                return check.first == self.info.base_first
        return True

    def checked(self, base: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, SparseTensor]]:
        """The base's name and the kept entries of one tensor after the other.

        Raises:
            ValueError: at the end, if the base's values at the kept entries are not those of this delta's own base.
        """
        check = EntriesHash()
        for name, part in self.tensors():
            check.update(gather_entries(base[names[name]], part.indices))
            yield names[name], part
        if check.hexdigest() != self.info.base_check:
            raise ValueError(odd_ones([self], [self]))


def _name(delta: SparseDelta | DeltaReader, place: int) -> str:
    return delta.folder.name if isinstance(delta, DeltaReader) else f"task{place}"


def names_in_base(sources: Sequence[MergeSource], base: Mapping[str, Tensor], where: str) -> list[dict[str, str]]:
    """Every delta's names of what is not carried, to the base's.

    Raises:
        ValueError: tensors that the base lacks, or deltas of another base, as far as that is known at once.
    """
    names = [source.names_in(base, where) for source in sources]
    odd = [source for source, own in zip(sources, names, strict=True) if not source.fits(base, own)]
    if odd:
        raise ValueError(odd_ones(odd, sources))
    return names


def odd_ones(odd: Sequence[MergeSource], sources: Sequence[MergeSource]) -> str:
    """The message for deltas of another base: which, what their base is, and what that of the others is."""
    others = sorted({s.info.base_fingerprint for s in sources if s not in odd})
    lines = [
        f"{s.task}: its base is {s.info.base_name or '(unnamed)'}, fingerprint {s.info.base_fingerprint}" for s in odd
    ]
    rest = f" The other deltas' base has the fingerprint {', '.join(others)}." if others else ""
    return (
        "these deltas were not pruned against the base that was given; only deltas of one base can be merged:\n  "
        + "\n  ".join(lines)
        + f"\n{rest.strip()} Leave them out, or give their base in its own dtype"
    )
