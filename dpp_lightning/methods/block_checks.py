"""What is said where a method goes by a model's blocks and finds none, or few of the model's entries in them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dpp_lightning.methods.tensor_pair import TensorPair

_FEW = 0.1  # of the entries
_SHOWN = 3  # names in a message


class PlacedTensor(NamedTuple):
    """A tensor by what a model's blocks say of it.

    Attributes:
        name: canonical name.
        numel: number of entries.
        block: the block it belongs to; None outside the blocks.
        linear: it is the weight of a linear map inside a block.
    """

    name: str
    numel: int
    block: str | None
    linear: bool


def check_pairs(methods: str, pairs: Iterable[TensorPair]) -> None:
    """Refuse a selection by blocks on tensors that have none; see :func:`check_blocks`.

    Args:
        methods: the methods that select so, with a verb: ``owl goes``, ``dp and dppa go``.
        pairs: what is pruned.

    Raises:
        ValueError: no pair is the weight of a linear map inside a block.
    """
    check_method(methods, [PlacedTensor(pair.name, pair.numel, pair.block, pair.linear) for pair in pairs])


def check_method(methods: str, tensors: Sequence[PlacedTensor]) -> None:
    """The same for tensors that are not pairs yet."""
    check_blocks(
        f"{methods} by the linear maps in a model's blocks",
        tensors,
        "take a method that needs none, such as 'dare' or 'magnitude'",
    )


def check_blocks(purpose: str, tensors: Sequence[PlacedTensor], otherwise: str) -> None:
    """Refuse tensors without a linear map inside a block, and warn where blocks have few of the entries.

    Args:
        purpose: what needs the blocks, such as ``owl goes by the linear maps in a model's blocks``.
        tensors: what is pruned, or might be.
        otherwise: what to take where the model has no such blocks.

    Raises:
        ValueError: there is none; the message, in one line, has the purpose, names and the cures.
    """
    if any(tensor.linear for tensor in tensors):
        _warn_of_few(purpose, tensors)
        return
    blocks = list(dict.fromkeys(tensor.block for tensor in tensors if tensor.block is not None))
    if blocks:
        raise ValueError(
            f"{purpose}, and the blocks of this model ({_some(blocks)}) hold none that is pruned (convolutions do not "
            f"count): {otherwise}"
        )
    names = [tensor.name for tensor in tensors]
    pattern = suggested_pattern(names) or "tower.cells.*"
    raise ValueError(
        f"{purpose}, and the names of the {len(names)} tensors ({_some(names)}) tell of none: say where the "
        f"blocks are, as in blocks={pattern!r} (--blocks), or {otherwise}"
    )


def suggested_pattern(names: Iterable[str]) -> str | None:
    """The likeliest pattern of blocks: the leading parts up to a number that most names have; None without numbers."""
    heads: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if numbered is not None:
            heads[".".join([*parts[:numbered], "*"])] += 1
    return max(heads, key=lambda head: heads[head], default=None)


def _warn_of_few(purpose: str, tensors: Sequence[PlacedTensor]) -> None:
    outside = {tensor.name: tensor.numel for tensor in tensors if tensor.block is None}
    total = sum(tensor.numel for tensor in tensors)
    inside = total - sum(outside.values())
    if inside >= _FEW * total:
        return
    largest = sorted(outside, key=lambda name: (-outside[name], name))
    pattern = suggested_pattern(largest)
    example = f", as in blocks={pattern!r} (--blocks)" if pattern else " (blocks=, --blocks)"
    warnings.warn(
        f"{purpose}, which have {100 * inside / total:.2g} % of the entries here; the largest tensors outside of them "
        f"are {_some(largest)}. If the model's blocks are others, say where{example}",
        stacklevel=4,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
