"""SparseDelta: a pruned delta in memory, applied to a base, taken off again bit for bit, rescaled, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dpp_lightning.fingerprint import hash_tensors
from dpp_lightning.names import TensorSource, align, canonical_tensors
from dpp_lightning.rescaling import check_q


@dataclass(frozen=True)
class SparseTensor:
    """The kept entries of one delta tensor.

    Attributes:
        shape: shape of the whole tensor.
        indices: sorted distinct flat positions (C order), int32 or int64, shape (kept,).
        values: theta - theta_0 at these positions, not yet divided by q, in the file's dtype, shape (kept,).
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says of itself besides its numbers: all of it is written to ``delta_config.json``.

    Attributes:
        method, pruning_rate, seed, q: as in the papers; a kept entry is applied as theta_0 + value / q.
        seeded: kept positions follow from seed and tensor names, so that no positions need storing.
        base_name, base_revision: hub id or folder of the base, if known.
        base_fingerprint: xxh3-128 over the base's tensors that the delta changes or relies on.
        base_check: xxh3-128 over the base's values at the kept positions, checked at every ``apply_``.
        entries: number of entries of the whole fine-tuned model.
        dense_bytes: bytes of the whole fine-tuned model in its own dtype.
        scope: the scope settings, as plain values.
        reverted: names of tensors that were left at the base's values.
    """

    method: str
    pruning_rate: float
    seed: int
    q: float
    seeded: bool
    base_name: str | None
    base_revision: str | None
    base_fingerprint: str
    base_check: str
    entries: int
    dense_bytes: int
    scope: dict[str, Any] = field(default_factory=dict)
    reverted: tuple[str, ...] = ()


class SparseDelta:
    """A pruned delta: kept entries of the pruned tensors, and carried tensors stored dense.

    Args:
        tensors: canonical name to kept entries.
        carried: canonical name to the dense fine-tuned tensor (a new head, tensors outside the scope).
        info: method, rate, seed, q, base.
    """

    def __init__(self, tensors: dict[str, SparseTensor], carried: dict[str, Tensor], info: DeltaInfo) -> None:
        self.tensors = tensors
        self.carried = carried
        self.info = info
        self._originals: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @property
    def q(self) -> float:
        """The number kept values are divided by."""
        return self.info.q

    @property
    def pruning_rate(self) -> float:
        """Fraction of the delta entries in scope that was dropped."""
        return self.info.pruning_rate

    @property
    def base_fingerprint(self) -> str:
        """xxh3-128 of the base's tensors in use, as hexadecimal text."""
        return self.info.base_fingerprint

    @property
    def num_kept(self) -> int:
        """Number of kept entries, carried tensors not counted."""
        return sum(t.values.numel() for t in self.tensors.values())

    @property
    def density(self) -> float:
        """Stored entries (kept and carried) over all entries of the model, in [0, 1]."""
        return (self.num_kept + sum(t.numel() for t in self.carried.values())) / max(self.info.entries, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of ``delta_model.safetensors`` and ``delta_config.json`` as ``save_pretrained`` writes them."""
        from dpp_lightning.codec import encode

        model, config = encode(self)
        return len(model) + len(config)

    def rescaled(self, q: float) -> SparseDelta:
        """The same kept entries under another q; shares all tensors, so it costs nothing.

        Raises:
            ValueError: q is not a finite number above 0.
        """
        return SparseDelta(self.tensors, self.carried, replace(self.info, q=check_q(q, self.pruning_rate)))

    def apply_(self, target: TensorSource, *, force: bool = False) -> None:
        """Add the delta to a base in place: theta_0 + value / q at kept entries, carried tensors copied. O(kept).

        The sum is taken in float32 (float64 for a float64 target) and cast to the target's dtype. The target's values
        at the kept positions are held until ``revert_``; nothing is written if any check fails.

        Args:
            target: module or state dict with the base's weights.
            force: apply although the target's values at the kept positions are not those of the delta's base.

        Raises:
            ValueError: tensors missing or of another shape, another base, or values that overflow the target's dtype.
            RuntimeError: this delta is applied to the target already.
        """
        found = self._find(target)
        if any(tensor in self._originals for tensor in found.values()):
            raise RuntimeError("this delta is already applied to the target; call revert_ first")
        kept = {name: take_entries(found[name], part.indices) for name, part in self.tensors.items()}
        if not force:
            self._check_base(kept, target)
        values = {n: self._sum(n, kept[n], part.values, found[n].dtype) for n, part in self.tensors.items()}
        originals = {**kept, **{name: found[name].detach().clone() for name in self.carried}}
        for name, tensor in found.items():
            self._originals[tensor] = originals[name]
            self._write(name, tensor, values.get(name, self.carried.get(name)))

    def revert_(self, target: TensorSource, *, base: TensorSource | None = None) -> None:
        """Take the delta off in place, bit for bit. O(kept).

        Args:
            target: module or state dict to which the delta is applied.
            base: where the original values come from if the delta was applied in another process.

        Raises:
            RuntimeError: the delta is not applied to the target and no ``base`` is given.
            ValueError: the base lacks tensors.
        """
        found = self._find(target)
        if base is not None:
            source = self._find(base)
            originals = {n: take_entries(source[n], part.indices) for n, part in self.tensors.items()}
            originals.update({n: source[n].detach().clone() for n in self.carried})
        elif all(tensor in self._originals for tensor in found.values()):
            originals = {name: self._originals[tensor] for name, tensor in found.items()}
        else:
            raise RuntimeError(
                "this delta is not applied to the target, so there is nothing to revert; if it was applied in another "
                "process or by another SparseDelta object, pass base= with the base's weights"
            )
        for name, tensor in found.items():
            self._write(name, tensor, originals[name])
            self._originals.pop(tensor, None)

    @contextmanager
    def applied(self, target: TensorSource, *, force: bool = False) -> Iterator[None]:
        """``with delta.applied(model): ...`` applies on entry and reverts on exit, also after an exception."""
        self.apply_(target, force=force)
        try:
            yield
        finally:
            self.revert_(target)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        positions: str | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Path:
        """Write ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card; whole or not at all.

        Args:
            folder: made if absent; an existing delta folder is replaced, a folder with anything else refused.
            dtype: dtype of the kept values (float32, bfloat16, float16); default as they are.
            positions: ``seed`` (no bytes; only a seeded selection) or ``index``; default the smaller that is possible.
            scores: figures for the card, name to value.

        Raises:
            ValueError: unknown dtype or coding, or values that overflow the dtype.
            OSError: the folder cannot be written.
        """
        from dpp_lightning.codec import write_folder

        return write_folder(self, Path(folder), dtype=dtype, positions=positions, scores=scores)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> SparseDelta:
        """Read a delta from a local folder or a hub id, checking everything before use.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: a file that is damaged, hostile, or of a newer format.
        """
        from dpp_lightning.codec import read_folder

        return read_folder(folder, revision)

    def _find(self, target: TensorSource) -> dict[str, Tensor]:
        """The target's tensors under this delta's names, shapes checked."""
        tensors = canonical_tensors(target)
        shapes = {
            **{n: t.shape for n, t in self.tensors.items()},
            **{n: tuple(t.shape) for n, t in self.carried.items()},
        }
        names = align(shapes, tensors)
        faults = [f"{name}: not in the target" for name in shapes if name not in names]
        faults += [
            f"{name}: shape {tuple(tensors[other].shape)}, the delta has {shapes[name]}"
            for name, other in names.items()
            if tuple(tensors[other].shape) != shapes[name]
        ]
        if faults:
            raise ValueError(
                f"the delta does not fit the target ({len(faults)} of {len(shapes)} tensors); is it the "
                f"architecture of its base {self.info.base_name or ''} with the fine-tuned head?\n  "
                + "\n  ".join(faults[:20])
            )
        return {name: tensors[other] for name, other in names.items()}

    def _check_base(self, kept: dict[str, Tensor], target: TensorSource) -> None:
        got = hash_tensors(kept)
        if got != self.info.base_check:
            raise ValueError(
                f"the target ({type(target).__name__}) is not the base of this delta: the values at its kept "
                f"positions hash to {got}, those of the base {self.info.base_name or '(unnamed)'} to "
                f"{self.info.base_check}. Load that base in its own dtype, or pass force=True to apply the delta anyway"
            )

    def _sum(self, name: str, base: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = (base.to(wide) + value.to(base.device, wide) / self.q).to(dtype)
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"{name}: theta_0 + value / q is not finite in {dtype} at q={self.q:g}; use a wider dtype or a larger q"
            )
        return total

    def _write(self, name: str, tensor: Tensor, value: Tensor | None) -> None:
        assert value is not None
        if name in self.carried:
            tensor.detach().copy_(value)
        else:
            put_entries(tensor, self.tensors[name].indices, value)


def take_entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat positions, as a copy."""
    flat = indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[flat]
    return tensor.detach()[torch.unravel_index(flat, tensor.shape)]


def put_entries(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Overwrite the entries at distinct flat positions."""
    flat = indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        tensor.detach().view(-1).index_copy_(0, flat, values)
    else:
        tensor.detach()[torch.unravel_index(flat, tensor.shape)] = values
