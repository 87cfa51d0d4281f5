"""One delta as a merge reads it: from memory or a folder, tensor by tensor, checked against the base on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dpp_lightning.delta.contents import DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.delta.match_tensors import find_tensors
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.storage.safe_text import is_task_name
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries, samples_of
from dpp_lightning.tensors.name_matching import match_names


@dataclass(frozen=True)
class MergeSource:
    """A delta to be merged.

    Attributes:
        task: its name.
        contents: what it consists of.
        folder: where it lies, if it does.
        factored: whether any tensor has factors.
    """

    task: str
    contents: DeltaContents
    folder: Path | None = None
    factored: bool = False

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
        folders = [delta.folder if isinstance(delta, DeltaReader) else None for delta in deltas]
        names = list(tasks or (folder.name if folder else f"task{k}" for k, folder in enumerate(folders)))
        _check_task_names(names)
        for name, delta in zip(names, deltas, strict=True):
            if inner := delta.info.tasks:
                raise ValueError(f"{name} is a merge of {', '.join(inner)}: merge the deltas of single models at once")
        return [
            cls(name, delta.contents, at, _has_factors(delta))
            for name, delta, at in zip(names, deltas, folders, strict=True)
        ]

    @property
    def info(self) -> DeltaInfo:
        """The delta's description."""
        return self.contents.info()

    def names_in(self, base: Mapping[str, Tensor], where: str) -> dict[str, str]:
        """This delta's names of what is not carried, to the base's.

        Raises:
            ValueError: tensors that the base lacks or has in another shape, all in one message.
        """
        shapes = self.contents.shapes_in_base
        find_tensors(shapes, base, where, self.info, longer=True)
        return match_names(shapes, base)

    def fits(self, base: Mapping[str, Tensor], names: Mapping[str, str]) -> bool:
        """Whether the first tensor with kept entries was pruned against this base: a wrong one is known at once."""
        check = EntriesHash()
        for name, tensor in self.contents.tensors():
            check.update(gather_entries(base[names[name]], tensor.changed))
            if check.first:
                return check.first == self.info.base_first
        return True

    def checked(self, base: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, SparseTensor]]:
        """The base's name and the kept entries of one tensor after the other.

        Raises:
            ValueError: at the end, if the base's values at the kept entries are not those of this delta's own base.
        """
        check = EntriesHash()
        for name, tensor in self.contents.tensors():
            check.update(gather_entries(base[names[name]], tensor.changed))
            yield names[name], tensor
        held = {name: base[in_base] for name, in_base in names.items()}
        if check.hexdigest(samples_of(held, self.contents.shapes_in_base)) != self.info.base_check:
            raise ValueError(_wrong_bases_message([self], [self]))


def names_in_base(sources: Sequence[MergeSource], base: Mapping[str, Tensor], where: str) -> list[dict[str, str]]:
    """Every delta's names of what is not carried, to the base's.

    Raises:
        ValueError: tensors that the base lacks, or deltas of another base, as far as that is known at once.
    """
    all_names = [source.names_in(base, where) for source in sources]
    wrong = [source for source, names in zip(sources, all_names, strict=True) if not source.fits(base, names)]
    if wrong:
        raise ValueError(_wrong_bases_message(wrong, sources))
    return all_names


def matched_to_base(
    sources: Sequence[MergeSource], base: Mapping[str, Tensor], where: str
) -> tuple[Mapping[str, Tensor], list[dict[str, str]]]:
    """The base by the deltas' names, and every delta's names of what is not carried, to those.

    Where the base is part of a larger model and all its names are longer by one prefix, that is left out, so that what
    is merged is called as in the deltas, and as what they carry.

    Raises:
        ValueError: as :func:`names_in_base`.
    """
    all_names = names_in_base(sources, base, where)
    pairs = {(name, in_base) for names in all_names for name, in_base in names.items()}
    prefixes = {in_base.removesuffix(name) if in_base.endswith(name) else "" for name, in_base in pairs}
    if len(prefixes) != 1 or not (prefix := prefixes.pop()):
        return base, all_names
    within = {name.removeprefix(prefix): tensor for name, tensor in base.items() if name.startswith(prefix)}
    return within, [{name: name for name in names} for names in all_names]


def _has_factors(delta: SparseDelta | DeltaReader) -> bool:
    if isinstance(delta, DeltaReader):
        return delta.table.has_factors
    return any(tensor.factors is not None for tensor in delta.tensors.values())


def _check_task_names(tasks: Sequence[str]) -> None:
    """Refuse names that cannot name files and tensors, or that come twice, where case does not count.

    Raises:
        ValueError: with the names and the cure.
    """
    unusable = [task for task in tasks if not is_task_name(task)]
    if unusable or len({task.lower() for task in tasks}) != len(tasks):
        raise ValueError(
            f"the deltas are named {', '.join(map(repr, tasks))}: each needs a name of its own of letters, digits, "
            "'_', '-' and '.'; give them in the deltas' order (tasks=, --tasks sst2 cola)"
        )


def _wrong_bases_message(wrong: Sequence[MergeSource], sources: Sequence[MergeSource]) -> str:
    """What to say of deltas of another base: which, what their base is, and what that of the others is."""
    others = sorted({s.info.base_fingerprint for s in sources if s not in wrong})
    lines = [
        f"{s.task}: its base is {s.info.base_name or '(unnamed)'}, fingerprint {s.info.base_fingerprint}" for s in wrong
    ]
    rest = f"; the other deltas' base has the fingerprint {', '.join(others)}" if others else ""
    return (
        "these deltas were not pruned against the base that was given, and only deltas of one base can be merged: "
        f"{'; '.join(lines)}{rest}. Leave them out, or give their base in its own dtype"
    )
