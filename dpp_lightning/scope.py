"""Scope: which tensors of a model are pruned, and what becomes of the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal

from torch import Tensor

Fate = Literal["prune", "carry", "revert"]

_BLOCK = re.compile(r"(^|\.)(layers?|blocks?|h)\.\d+\.")


@dataclass(frozen=True)
class Scope:
    """Which tensors are pruned.

    Attributes:
        kind: ``all`` prunes every floating-point tensor; ``linear`` only the weights and biases of the linear maps
            inside the numbered blocks (two-dimensional ``….weight`` and its ``….bias``), as for decoders.
        include: glob patterns on canonical names; if given, only matching tensors are pruned.
        exclude: glob patterns on canonical names that are never pruned.
        outside: a tensor outside the scope is carried (stored dense, fine-tuned) or reverted (base value).
        carry: glob patterns of tensors that are always carried, such as a head that was new in this training.
    """

    kind: Literal["all", "linear"] = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    outside: Literal["carry", "revert"] = "carry"
    carry: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ValueError: an unknown kind or treatment.
        """
        for value, choices, what in (
            (self.kind, ("all", "linear"), "scope"),
            (self.outside, ("carry", "revert"), "outside"),
        ):
            if value not in choices:
                raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}")

    def carrying(self, names: Iterable[str]) -> Scope:
        """This scope with further tensors always carried: new heads, buffers."""
        return replace(self, carry=(*self.carry, *(escape(name) for name in sorted(names))))

    def fates(self, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> dict[str, Fate]:
        """What becomes of each fine-tuned tensor: pruned, carried or reverted.

        A tensor that the base does not have under this name and shape is new and always carried, and so is one that a
        ``carry`` pattern names. Tensors that are not floating point (counters) are carried.

        Raises:
            ValueError: a pattern matches no tensor, or nothing is left to prune.
        """
        self._check_patterns(finetuned)
        fates: dict[str, Fate] = {}
        for name, tensor in finetuned.items():
            known = name in base and base[name].shape == tensor.shape and tensor.is_floating_point()
            if not known or _matches(name, self.carry):
                fates[name] = "carry"
            else:
                fates[name] = "prune" if self._inside(name, finetuned) else self.outside
        if "prune" not in fates.values():
            raise ValueError(
                f"no tensor is left to prune with {self}: of {len(finetuned)} tensors "
                f"{sum(name in base for name in finetuned)} have a base of their name. First names: "
                f"fine-tuned {sorted(finetuned)[:3]}, base {sorted(base)[:3]}"
            )
        return fates

    def _inside(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        if self.include and not _matches(name, self.include):
            return False
        if _matches(name, self.exclude):
            return False
        return self.kind == "all" or _is_linear(name, tensors)

    def _check_patterns(self, tensors: Mapping[str, Tensor]) -> None:
        for what, patterns in (("include", self.include), ("exclude", self.exclude), ("carry", self.carry)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in tensors):
                    raise ValueError(
                        f"the {what} pattern {pattern!r} matches none of the {len(tensors)} tensors; patterns are "
                        f"globs on canonical names such as {', '.join(sorted(tensors)[:3])}"
                    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_linear(name: str, tensors: Mapping[str, Tensor]) -> bool:
    owner, _, kind = name.rpartition(".")
    weight = tensors.get(f"{owner}.weight")
    return bool(_BLOCK.search(name)) and kind in ("weight", "bias") and weight is not None and weight.dim() == 2
