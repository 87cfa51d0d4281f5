"""prune(): the one way from two models to a SparseDelta, used by the callback and from Python alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dpp_lightning.calibration import search_q
from dpp_lightning.checkpoints import load_tensors
from dpp_lightning.delta import DeltaInfo, SparseDelta, SparseTensor, take_entries
from dpp_lightning.fingerprint import hash_tensors
from dpp_lightning.methods import get_method
from dpp_lightning.names import TensorSource, align, buffer_names, canonical_tensors, check_prunable
from dpp_lightning.rescaling import check_q
from dpp_lightning.sampling import exact_rate
from dpp_lightning.scope import Fate, Scope

Weights = TensorSource | str | Path
Objective = Callable[[SparseDelta], float]

VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prune(
    base: Weights,
    finetuned: Weights,
    method: str = "darex-q",
    pruning_rate: float = 0.9,
    seed: int = 0,
    scope: Literal["all", "linear"] = "all",
    carry: Sequence[str] = (),
    calibration: Objective | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    outside: Literal["carry", "revert"] = "carry",
    dtype: str | None = None,
    q: float | None = None,
) -> SparseDelta:
    """Prune the delta between two models.

    Args:
        base: pre-trained weights: module, state dict, local folder or hub id.
        finetuned: fine-tuned weights, likewise.
        method: a name of ``METHODS``.
        pruning_rate: fraction of the delta dropped, in [0, 1).
        seed: mask seed, an integer >= 0.
        scope, include, exclude, outside, carry: which tensors are pruned, see :class:`dpp_lightning.scope.Scope`.
        calibration: for a method that searches q: candidate delta to a number to be minimised, such as the output
            change on one batch.
        dtype: dtype of the kept values; default the fine-tuned one, at most 32 bits.
        q: a q given by hand; then nothing is searched.

    Raises:
        ValueError: an unknown method, a rate outside [0, 1), weights that do not match or cannot be pruned, a method
        that
            searches q without ``q=`` and ``calibration=``.
    """
    row = get_method(method)
    exact_rate(pruning_rate)
    if row.searches_q and q is None and calibration is None and pruning_rate > 0:
        raise ValueError(
            f"{method} searches q: pass calibration= (candidate SparseDelta to a number to be minimised), "
            "or q= to set it by hand, or take method='dare' for q = 1 - pruning_rate"
        )
    settings = Scope(scope, tuple(include), tuple(exclude), outside, tuple(carry))
    plan = PruningPlan.of(_weights(base), _weights(finetuned), settings, base_name=_name(base))
    delta = plan.draw(method, pruning_rate, seed, dtype)
    if q is not None:
        return delta.rescaled(check_q(q, pruning_rate))
    if row.searches_q and calibration is not None:
        return delta.rescaled(search_q(lambda x: calibration(delta.rescaled(x)), pruning_rate).q)
    return delta


@dataclass(frozen=True)
class PruningPlan:
    """Two sets of weights matched by name, with the fate of every tensor: what all masks of one pair have in common.

    Attributes:
        base, finetuned: canonical name (of the fine-tuned side) to tensor; read, never written.
        fates: what becomes of each fine-tuned tensor.
        fingerprint: xxh3-128 of the base's tensors that are not carried.
    """

    base: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    fates: dict[str, Fate]
    unchanged: frozenset[str]
    scope: Scope
    fingerprint: str
    base_name: str | None = None
    base_revision: str | None = None

    @classmethod
    def of(
        cls,
        base: TensorSource,
        finetuned: TensorSource,
        scope: Scope,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        canonical: bool = False,
    ) -> PruningPlan:
        """Match the two and decide every tensor's fate.

        Args:
            base, finetuned: modules or state dicts.
            scope: which tensors are pruned.
            base_name, base_revision: for the file.
            canonical: both are mappings of canonical names already.

        Raises:
            ValueError: weights that cannot be pruned, or nothing to prune in common.
        """
        if canonical and isinstance(base, Mapping) and isinstance(finetuned, Mapping):
            ours, theirs = dict(finetuned), dict(base)
        else:
            ours, theirs = canonical_tensors(finetuned), canonical_tensors(base)
            scope = scope.carrying(buffer_names(finetuned))
        check_prunable(ours)
        matched = {name: theirs[other] for name, other in align(ours, theirs).items()}
        fates = scope.fates(matched, ours)
        unchanged = frozenset(
            n for n, t in ours.items() if n in matched and t.shape == matched[n].shape and _same(t, matched[n])
        )
        used = {name: matched[name] for name, fate in fates.items() if fate != "carry"}
        return cls(matched, ours, fates, unchanged, scope, hash_tensors(used), base_name, base_revision)

    def draw(self, method: str, pruning_rate: float, seed: int, dtype: str | None = None) -> SparseDelta:
        """One pruned delta: positions, then values at those positions only. q is the method's first candidate.

        Args:
            method, pruning_rate, seed: as in :func:`prune`.
            dtype: ``float32``, ``bfloat16`` or ``float16``; default each tensor's own, at most 32 bits.

        Raises:
            ValueError: an unknown method or dtype, a rate outside [0, 1), or values that overflow the dtype.
        """
        row = get_method(method)
        tensors, check = {}, {}
        for name in self.pruned:
            base, finetuned = self.base[name], self.finetuned[name]
            positions = row.select(name, base, finetuned, pruning_rate, seed)
            kept = take_entries(base, positions)
            check[name] = kept
            values = take_entries(finetuned, positions).float() - kept.to(finetuned.device).float()
            short = positions.to(torch.int32) if finetuned.numel() < 2**31 else positions
            tensors[name] = SparseTensor(tuple(finetuned.shape), short, to_value_dtype(values, dtype, finetuned, name))
        carried = {
            name: self.finetuned[name].detach().clone()
            for name, fate in self.fates.items()
            if fate == "carry" and name not in self.unchanged
        }
        info = DeltaInfo(
            method=method,
            pruning_rate=float(pruning_rate),
            seed=seed,
            q=row.rescale(pruning_rate),
            seeded=row.seeded,
            base_name=self.base_name,
            base_revision=self.base_revision,
            base_fingerprint=self.fingerprint,
            base_check=hash_tensors(check),
            entries=sum(t.numel() for t in self.finetuned.values()),
            dense_bytes=sum(t.numel() * t.element_size() for t in self.finetuned.values()),
            scope={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.scope).items()},
            reverted=tuple(n for n, fate in self.fates.items() if fate == "revert" and n not in self.unchanged),
        )
        return SparseDelta(tensors, carried, info)

    @property
    def pruned(self) -> list[str]:
        """Names of the tensors whose delta is pruned; those that training left as they were have none."""
        return [name for name, fate in self.fates.items() if fate == "prune" and name not in self.unchanged]


def to_value_dtype(values: Tensor, dtype: str | None, like: Tensor, name: str) -> Tensor:
    """Kept values in the file's dtype.

    Raises:
        ValueError: unknown dtype, or values that are not finite in it.
    """
    if dtype is not None and dtype not in VALUE_DTYPES:
        raise ValueError(f"dtype of the kept values must be one of {', '.join(VALUE_DTYPES)}, got {dtype!r}")
    target = VALUE_DTYPES[dtype] if dtype else (like.dtype if like.element_size() <= 4 else torch.float32)
    cast = values.to(target)
    if not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name}: kept values are not finite in {target}; check the weights or choose a wider dtype")
    return cast


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach(), b.detach().to(a.device))


def _weights(source: Weights) -> TensorSource:
    if isinstance(source, nn.Module | Mapping):
        return source
    return load_tensors(source)


def _name(source: Weights) -> str | None:
    return str(source) if isinstance(source, str | Path) else None
