"""Scope: which tensors of a model are pruned, where its blocks are, and what becomes of the other tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal

from torch import Tensor

from dpp_lightning.methods.block_checks import PlacedTensor, check_blocks, suggested_pattern
from dpp_lightning.tensors.blocks import block_of, is_linear_map, weights_of_bias

Fate = Literal["prune", "carry", "revert"]

_SHOWN = 4  # names in a message
_VOCABULARY = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared|lm_head|decoder)\.weight$|embeddings\.weight$")


@dataclass(frozen=True)
class Scope:
    """Which tensors are pruned.

    Attributes:
        kind: ``all`` prunes every floating-point tensor; ``linear`` only the weights and biases of the linear maps
            inside the model's blocks, as for decoders.
        include: glob patterns on canonical names; if given, only matching tensors are pruned.
        exclude: glob patterns on canonical names that are never pruned.
        outside: a tensor outside the scope is carried (stored dense, fine-tuned) or reverted (base value).
        carry: glob patterns of tensors that are always carried, such as a head that was new in this training.
        blocks: where the model's blocks are, for ``linear`` and for the methods that go by blocks, if their names do
            not tell: globs of the leading parts of canonical names, one part for one, such as ``tower.cells.*``.
    """

    kind: Literal["all", "linear"] = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    outside: Literal["carry", "revert"] = "carry"
    carry: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        scope: Literal["all", "linear"] = "all",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Literal["carry", "revert"] = "carry",
        carry: Sequence[str] = (),
        blocks: Sequence[str] = (),
    ) -> Scope:
        """A scope of the settings as they are given: patterns in any sequence, or a single one as a text.

        Raises:
            ValueError: an unknown kind or treatment.
        """
        included, excluded, carried, of_blocks = map(_as_patterns, (include, exclude, carry, blocks))
        return cls(scope, included, excluded, outside, carried, of_blocks)

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

    def block_of(self, name: str) -> str | None:
        """The block that a tensor belongs to, see :func:`dpp_lightning.tensors.blocks.block_of`."""
        return block_of(name, self.blocks)

    def is_linear_map(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor is the weight of a linear map inside a block, see :mod:`dpp_lightning.tensors.blocks`."""
        return is_linear_map(name, shape, self.blocks)

    def carrying(self, names: Iterable[str]) -> Scope:
        """This scope with further tensors always carried: new heads, buffers."""
        return replace(self, carry=(*self.carry, *(escape(name) for name in sorted(names))))

    def placed(self, tensors: Mapping[str, Tensor]) -> list[PlacedTensor]:
        """Tensors with the blocks they are in, as :mod:`dpp_lightning.methods.block_checks` takes them."""
        return [
            PlacedTensor(name, tensor.numel(), self.block_of(name), self.is_linear_map(name, tensor.shape))
            for name, tensor in tensors.items()
        ]

    def fates(
        self, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], ignored: Mapping[str, Tensor] | None = None
    ) -> dict[str, Fate]:
        """What becomes of each fine-tuned tensor: pruned, carried or reverted.

        A tensor that the base does not have under this name and shape is new and always carried, and so is one that a
        ``carry`` pattern names. Vocabularies may differ in their rows: those in common are pruned. Tensors that are
        not floating point (counters) are carried.

        Args:
            base: the matched tensors of the base, under the fine-tuned names.
            finetuned: the fine-tuned tensors.
            ignored: further tensors of the base, which the fine-tuned model does not have.

        Raises:
            ValueError: a pattern matches no tensor, a linear map inside the blocks has no counterpart on the other
                side (another architecture), there is no linear map for ``linear``, or nothing is left to prune.
        """
        self._check_patterns(finetuned)
        self._check_layers(base, finetuned, ignored or {})
        if self.kind == "linear":
            self._check_linear_maps(finetuned)
        fates: dict[str, Fate] = {}
        for name, tensor in finetuned.items():
            known = name in base and tensor.is_floating_point() and comparable(name, base[name], tensor)
            if not known or _matches(name, self.carry):
                fates[name] = "carry"
            else:
                fates[name] = "prune" if self._inside(name, finetuned) else self.outside
        if "prune" not in fates.values():
            raise ValueError(
                f"no tensor is left to prune with {self.described()}: of {len(finetuned)} tensors "
                f"{sum(name in base for name in finetuned)} have a base of their name. First names: "
                f"fine-tuned {sorted(finetuned)[:3]}, base {sorted(base)[:3]}"
            )
        return fates

    def described(self) -> str:
        """The settings that are not the defaults, as they are given."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        words = [f"{'scope' if n == 'kind' else n}={list(v) if isinstance(v, tuple) else v}" for n, v in given]
        return ", ".join(words) or "scope=all"

    def _check_linear_maps(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse ``linear`` for a model in which nothing is one."""
        check_blocks(
            "scope='linear' prunes the linear maps in a model's blocks",
            self.placed({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}),
            "take scope='all' (--scope all), or name the tensors themselves (include=, --include)",
        )

    def _check_layers(
        self, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], ignored: Mapping[str, Tensor]
    ) -> None:
        """A head may be new; a linear map inside the numbered blocks that only one side has is a wrong pair."""
        if not base:
            return  # reported as nothing to prune, with the names of both sides
        faults = [
            f"{name}: only in the fine-tuned model"
            if name not in base
            else f"{name}: shape {tuple(tensor.shape)}, in the base {tuple(base[name].shape)}"
            for name, tensor in finetuned.items()
            if self.is_linear_map(name, tensor.shape)
            and not _matches(name, self.carry)
            and (name not in base or base[name].shape != tensor.shape)
        ]
        faults += [f"{name}: only in the base" for name, t in ignored.items() if self.is_linear_map(name, t.shape)]
        if faults:
            raise ValueError(
                f"base and fine-tuned model do not have the same layers, {len(faults)} tensors: "
                f"{'; '.join(faults[:_SHOWN])}{'; …' if len(faults) > _SHOWN else ''}. If a tensor is meant to be new, "
                "name it with carry="
            )

    def _inside(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        if self.include and not _matches(name, self.include):
            return False
        if _matches(name, self.exclude):
            return False
        return self.kind == "all" or self._is_of_linear_map(name, tensors)

    def _is_of_linear_map(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a tensor is the weight or the bias of a linear map inside a block."""
        weights = [(name, tensors[name]), *((other, tensors.get(other)) for other in weights_of_bias(name))]
        return any(weight is not None and self.is_linear_map(other, weight.shape) for other, weight in weights)

    def _check_patterns(self, tensors: Mapping[str, Tensor]) -> None:
        for what, patterns in (("include", self.include), ("exclude", self.exclude), ("carry", self.carry)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in tensors):
                    raise ValueError(
                        f"the {what} pattern {pattern!r} matches none of the {len(tensors)} tensors; patterns are "
                        f"globs on canonical names such as {', '.join(sorted(tensors)[:3])}"
                    )
        for pattern in self.blocks:
            if not any(block_of(name, [pattern]) for name in tensors):
                raise ValueError(
                    f"the blocks pattern {pattern!r} matches none of the {len(tensors)} tensors; it is a glob of the "
                    f"leading parts of names such as {', '.join(sorted(tensors)[:3])}, one part for one, as in "
                    f"{suggested_pattern(tensors) or 'tower.cells.*'!r}"
                )


def comparable(name: str, base: Tensor, finetuned: Tensor) -> bool:
    """Of one shape, or vocabularies that differ in their rows."""
    if base.shape == finetuned.shape:
        return True
    both = base.dim() == finetuned.dim() == 2 and base.shape[1] == finetuned.shape[1]
    return both and bool(_VOCABULARY.search(name))


def _as_patterns(value: Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
