"""Whether a model or file is the base of a delta: all tensors there, with the base's values at the kept positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

from torch import Tensor, nn

from dpp_lightning.delta.contents import DeltaContents, DeltaInfo
from dpp_lightning.tensors.flat_entries import EntriesHash, is_sampled, samples_of
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import NamedTensor, TensorSource, named_tensors

_SHOWN = 4


def find_tensors(
    shapes: Mapping[str, tuple[int, ...] | None],
    tensors: Mapping[str, Tensor],
    where: str,
    info: DeltaInfo,
    *,
    longer: bool = False,
) -> dict[str, Tensor]:
    """A model's tensors under the delta's names.

    Args:
        shapes: the delta's names and the shapes they must have; None for any.
        tensors: canonical name to tensor.
        where: what holds them, for the message.
        info: the delta's description.
        longer: a tensor may have more rows (a vocabulary that fine-tuning made shorter).

    Raises:
        ValueError: tensors that are missing or of another shape, and those that are left over, all in one message.
    """
    names = match_names(shapes, tensors)
    faults = [f"{name}: not there" for name in shapes if name not in names]
    for name, model_name in names.items():
        expected, actual = shapes[name], tuple(tensors[model_name].shape)
        if expected is not None and actual != expected and not (longer and _has_more_rows(actual, expected)):
            faults.append(f"{name}: shape {actual}, the delta has {expected}")
    if faults:
        extra = sorted(set(tensors) - set(names.values()))
        rest = f"; not in the delta: {_few(extra)}" if extra else ""
        raise ValueError(
            f"the delta does not fit {where}, {len(faults)} of {len(shapes)} tensors: {_few(faults)}{rest}; is it the "
            f"architecture of its base {info.base_name or '(unnamed)'}, with the fine-tuned head and vocabulary?"
        )
    return {name: tensors[model_name] for name, model_name in names.items()}


def named_for(target: TensorSource, names: Set[str]) -> list[NamedTensor]:
    """A target's tensors by their names in its files, or in memory where a delta's names are those of state dicts.

    Args:
        target: module or state dict.
        names: the delta's names.
    """
    named = named_tensors(target)
    if isinstance(target, nn.Module) and not names <= {n.name for n in named}:
        in_memory = named_tensors(target, in_memory=True)
        return in_memory if names <= {n.name for n in in_memory} else named
    return named


def check_base(entries: Iterable[Tensor], contents: DeltaContents, base: TensorSource, where: str) -> None:
    """Check that what a target holds at the entries that change are the values of the delta's base.

    Args:
        entries: of every pruned tensor in the delta's order, shapes (changed,); one at a time is enough.
        contents: the delta.
        base: the target, of which samples are read where no entry changes.
        where: what the message calls it.

    Raises:
        ValueError: they are not.
    """
    check = EntriesHash()
    for values in entries:
        check.update(values)
    check_digest(check, contents.info(), base_samples(contents, base, where), where)


def check_digest(check: EntriesHash, info: DeltaInfo, samples: Iterable[Tensor], where: str) -> None:
    """The end of :func:`check_base`, for those who hash the entries themselves.

    Args:
        check: hash of the entries.
        info: the delta's description.
        samples: :func:`dpp_lightning.tensors.flat_entries.samples_of` the base, read only where no entry changes.
        where: what the message calls the base.

    Raises:
        ValueError: another base.
    """
    digest = check.hexdigest(samples)
    if digest != info.base_check:
        raise ValueError(wrong_base_message(where, digest, info))


def base_samples(contents: DeltaContents, base: TensorSource, where: str) -> Iterator[Tensor]:
    """Samples of what a delta leaves to its base; nothing is read before the first is asked for.

    Raises:
        ValueError: tensors that the base lacks.
    """
    shapes = {name: shape for name, shape in contents.shapes_in_base.items() if is_sampled(name)}
    held = {named.name: named.tensor for named in named_for(base, shapes.keys())}
    yield from samples_of(find_tensors(shapes, held, where, contents.info(), longer=True), shapes)


def wrong_base_message(target: str, digest: str, info: DeltaInfo) -> str:
    """What to say of a base that is not the delta's: both names, both hashes, the cure.

    Args:
        target: what the delta was to be applied to.
        digest: hash of its values at the kept positions, see :class:`dpp_lightning.tensors.flat_entries.EntriesHash`.
        info: the delta's description.
    """
    return (
        f"{target} is not the base of this delta: its values at the kept positions hash to {digest}, those of the base "
        f"{info.base_name or '(unnamed)'} to {info.base_check}. Use that base in its own dtype, or force the delta "
        "onto this one where there is such an option (force=True, --force)"
    )


def _has_more_rows(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(actual) == len(expected) > 0 and actual[0] > expected[0] and actual[1:] == expected[1:]


def _few(faults: list[str]) -> str:
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
