"""Whether two models may be base and fine-tuned model, by the shapes of the tensors that they have in common.

A head of another number of labels is new, and a vocabulary may have grown; everything else that a model is made of
keeps its shape when it is fine-tuned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor

from dpp_lightning.pruning.scope import Scope, comparable

_POSITIONS = re.compile(r"(?:^|[._])(?:rel(?:ative)?_)?pos|position|wpe|coords", re.IGNORECASE)
_SHOWN = 4

_Sizes = tuple[int, int]  # of one dimension, in the base and in the fine-tuned model


def check_shapes(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], scope: Scope) -> None:
    """Refuse two models whose tensors differ in shape in a way that fine-tuning does not bring about.

    New may be, without a pattern of ``carry``: the layers of a head outside the blocks, where all that differs is how
    many outputs they have and what follows from that; rows of a vocabulary; tables of positions. Counters are left out.
    Linear maps inside the blocks are left to :meth:`Scope.fates`, which refuses them beside those of one side alone.

    Args:
        base, finetuned: canonical name to tensor.
        scope: tells where blocks are and which tensors are carried.

    Raises:
        ValueError: one line with the number of tensors, the first names with both shapes, and the cure.
    """
    common = [
        name
        for name, tensor in finetuned.items()
        if name in base and tensor.is_floating_point() and not any(fnmatchcase(name, p) for p in scope.carry)
    ]
    other = [name for name in common if base[name].shape != finetuned[name].shape]
    grown = {name for name in other if comparable(name, base[name], finetuned[name])}
    sizes = {name: _differing(base[name], finetuned[name]) for name in other}
    known = {sizes[name][0] for name in grown}
    known |= {sizes[name][0] for name in other if _is_output_layer(name, finetuned[name], sizes[name], scope)}
    left = [name for name in other if name not in grown and not _is_position_table(name, base[name], finetuned[name])]
    unexplained = [n for n in left if scope.block_of(n) or not sizes[n] or not known.issuperset(sizes[n].values())]
    in_fates = any(scope.is_linear_map(name, finetuned[name].shape) for name in left)
    if in_fates or (not unexplained and 2 * len(left) <= len(common)):
        return
    faults = unexplained or left
    shown = "; ".join(f"{n} {tuple(finetuned[n].shape)}, in the base {tuple(base[n].shape)}" for n in faults[:_SHOWN])
    raise ValueError(
        f"base and fine-tuned model do not have the same layers: of {len(common)} tensors in common {len(faults)} have "
        f"another shape that no new head and no vocabulary explains ({shown}{'; …' if len(faults) > _SHOWN else ''}). "
        "Is the base the model that was fine-tuned? A tensor that is new on purpose is named with carry= (--carry)"
    )


def _differing(base: Tensor, finetuned: Tensor) -> dict[int, _Sizes]:
    """Dimension to its two sizes where they differ; none where the ranks do."""
    if base.dim() != finetuned.dim():
        return {}
    sizes = enumerate(zip(base.shape, finetuned.shape, strict=True))
    return {dim: (a, b) for dim, (a, b) in sizes if a != b}


def _is_output_layer(name: str, tensor: Tensor, sizes: Mapping[int, _Sizes], scope: Scope) -> bool:
    """Whether a map outside the blocks differs in its number of outputs alone."""
    return tensor.dim() > 1 and list(sizes) == [0] and scope.block_of(name) is None


def _is_position_table(name: str, base: Tensor, finetuned: Tensor) -> bool:
    """Whether a tensor holds vectors of positions, of another number of positions."""
    same_vectors = base.dim() == finetuned.dim() > 1 and base.shape[-1] == finetuned.shape[-1]
    return same_vectors and _POSITIONS.search(name) is not None
