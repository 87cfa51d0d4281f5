"""Tensors of two models matched by name, and what the files of a model call them.

The canonical names of two models may still differ by leading parts, where what held one of them was no model of
transformers, and a trainer's checkpoint does not say what the model's own files call its tensors: the base's do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from dpp_lightning.tensors.names import (
    BASE_MODEL_PREFIXES,
    NamedTensor,
    in_new_spelling,
    shared_parts,
    without_base_prefix,
)


class SeveralModelsError(ValueError):
    """A source holds more than one model that is meant equally well."""


def match_names(wanted: Iterable[str], offered: Iterable[str]) -> dict[str, str]:
    """Match two sets of canonical names that may still differ by leading parts (``net.``, ``student.bert.``).

    Of all leading parts that could be added to or removed from the wanted names, those with the most matches are
    taken, if they match more than are equal.

    Args:
        wanted: names to look for.
        offered: names to look among.

    Returns:
        Wanted name to offered name; wanted names without a match are left out.

    Raises:
        SeveralModelsError: several leading parts match equally many names.
    """
    wanted, offered = list(wanted), set(offered)
    equal = {name: name for name in wanted if name in offered}
    if len(equal) == len(wanted):  # no leading part matches more
        return equal
    votes = Counter((prefix, True) for prefix in _prefixes_before(wanted, offered))
    votes.update((prefix, False) for prefix in _prefixes_before(offered, wanted))
    ranked = votes.most_common()
    if not ranked or ranked[0][1] <= len(equal):
        return equal
    rivals = sorted(prefix for (prefix, _), count in ranked if count == ranked[0][1])
    if len(rivals) > 1:
        raise SeveralModelsError(
            f"tensors of these names are there {len(rivals)} times, under {', '.join(map(repr, rivals))}: choose one "
            "model (--prefix), or give its tensors alone"
        )
    (prefix, added), _ = ranked[0]
    if added:
        renamed = {name: prefix + name for name in wanted if prefix + name in offered}
    else:
        renamed = {name: name.removeprefix(prefix) for name in wanted if name.startswith(prefix)}
        renamed = {name: rest for name, rest in renamed.items() if rest in offered}
    taken = set(renamed.values())
    return {**{name: name for name in equal if name not in taken}, **renamed}


def match_models(
    finetuned: Sequence[NamedTensor], base: Sequence[NamedTensor]
) -> tuple[list[NamedTensor], dict[str, NamedTensor]]:
    """The tensors of a fine-tuned model under the names that they go by, and the base's of the same names.

    Where the two sides name a tensor differently, by leading parts, the shorter name is taken, unless another tensor of
    the fine-tuned model has it: so one pair of models has one set of names however each of them is held.

    Args:
        finetuned, base: of :func:`named_tensors`.

    Returns:
        The fine-tuned tensors in their order; name to the base's tensor, for those that the base has.

    Raises:
        SeveralModelsError: as :func:`match_names`.
    """
    by_name = {n.name: n for n in base}
    matched = match_names([n.name for n in finetuned], by_name)
    short = {name: min(name, other, key=len) for name, other in matched.items()}
    counts = Counter(short.get(n.name, n.name) for n in finetuned)
    chosen = {n.name: short[n.name] for n in finetuned if n.name in short and counts[short[n.name]] == 1}
    renamed = [replace(n, name=chosen.get(n.name, n.name)) for n in finetuned]
    return renamed, {chosen.get(name, name): by_name[other] for name, other in matched.items()}


def _prefixes_before(short: Iterable[str], long: Iterable[str]) -> Iterator[str]:
    """For each long name that ends in a short one, of two parts or more, the parts before that."""
    short = {name for name in short if "." in name}
    for name in long:
        parts = name.split(".")
        for k in range(1, len(parts)):
            if ".".join(parts[k:]) in short:
                yield ".".join(parts[:k]) + "."


def saved_names(
    finetuned: Sequence[NamedTensor], base: Mapping[str, str], *, exact: bool
) -> tuple[str, dict[str, str]]:
    """How a fine-tuned model's own files name its tensors: the prefix of most, and the names that differ.

    Args:
        finetuned: its tensors.
        base: canonical name of those that the base has too to the name in the base's files.
        exact: what ``finetuned`` says of the names in the files is so to the letter. Otherwise the names may have
            further parts before them, such as a LightningModule's ``model.``, and the base's files tell which.

    Returns:
        The prefix, possibly empty, and canonical name to name in the files where that is not prefix + canonical name.
    """
    saved = {n.name: n.saved for n in finetuned}
    if not exact:
        drop = _wrapper_prefix(saved, base)
        saved = {name: file_name.removeprefix(drop) for name, file_name in saved.items()}
        old = {name: file_name for name, file_name in base.items() if in_new_spelling(file_name) == saved.get(name)}
        saved |= old
    prefixes = Counter(s.removesuffix(name) for name, s in saved.items() if s.endswith(name))
    usual = prefixes.most_common(1)[0][0] if prefixes else ""
    return usual, {name: file_name for name, file_name in saved.items() if file_name != usual + name}


def dense_names(saved: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """What the tensors of a dense folder are called: as the fine-tuned model's files call them, without parts before
    that are of no model but of what held it, such as a LightningModule's ``model.``.

    Args:
        saved: canonical name to what the delta says of the name in the files.
        base: canonical name of those that the base has to the name in the base's files.
    """
    drop = _wrapper_prefix(saved, base) if base else ""
    return {name: file_name.removeprefix(drop) for name, file_name in saved.items()}


def _wrapper_prefix(saved: Mapping[str, str], base: Mapping[str, str]) -> str:
    """What stands before a model's own names, such as a LightningModule's ``model.``.

    Args:
        saved: canonical name to name.
        base: canonical name to the name in the base's files.
    """
    pairs = [(saved[name], in_new_spelling(file_name)) for name, file_name in base.items() if name in saved]
    votes = Counter(s.removesuffix(b) for s, b in pairs if s == b or s.endswith(f".{b}"))
    if not votes:
        split = [name.split(".") for name in saved.values()]
        return "".join(f"{part}." for part in split[0][: shared_parts(saved.values())]) if split else ""
    before = votes.most_common(1)[0][0]
    outer, _, last = before.removesuffix(".").rpartition(".")
    outer += "." if outer else ""
    bare = not any(name != without_base_prefix(name) for name in base.values())
    others = any(name.startswith(outer) and not name.startswith(before) for name in saved.values())
    return outer if bare and others and last in BASE_MODEL_PREFIXES else before
