"""Finding a delta's tensors in a model or file, everything that does not fit told in one error."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dpp_lightning.delta.contents import DeltaInfo
from dpp_lightning.tensors.names import match_names

_SHOWN = 40


def matched(
    shapes: Mapping[str, tuple[int, ...] | None],
    tensors: Mapping[str, Tensor],
    where: str,
    info: DeltaInfo,
    *,
    longer: bool = False,
) -> dict[str, Tensor]:
    """The tensors under the delta's names.

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
    for name, other in names.items():
        shape, found = shapes[name], tuple(tensors[other].shape)
        if shape is not None and found != shape and not (longer and _longer(found, shape)):
            faults.append(f"{name}: shape {found}, the delta has {shape}")
    if faults:
        extra = sorted(set(tensors) - set(names.values()))
        lines = [*faults[:_SHOWN], *(f"{name}: not in the delta" for name in extra[:_SHOWN])]
        raise ValueError(
            f"the delta does not fit {where} ({len(faults)} of {len(shapes)} tensors); is it the architecture of its "
            f"base {info.base_name or '(unnamed)'}, with the fine-tuned head and vocabulary?\n  " + "\n  ".join(lines)
        )
    return {name: tensors[other] for name, other in names.items()}


def _longer(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(found) == len(shape) > 0 and found[0] > shape[0] and found[1:] == shape[1:]
