"""SparseDelta: a pruned delta in memory, applied to a base, taken off again bit for bit, rescaled, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dpp_lightning.delta.contents import AbsoluteEntries, DeltaInfo, SparseTensor, wrong_base
from dpp_lightning.delta.match_tensors import matched
from dpp_lightning.delta.task_heads import of_task
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.tensors.flat_entries import (
    EntriesHash,
    add_rescaled,
    gather_entries,
    group_by_device_and_dtype,
    scatter_entries,
)
from dpp_lightning.tensors.names import TensorSource, canonical_tensors, describe_source, match_names, source_names
from dpp_lightning.tensors.shards import is_dtensor, shard_like
from dpp_lightning.tensors.threads import in_order, over_threads


class SparseDelta:
    """A pruned delta: kept entries of the pruned tensors, and carried tensors stored dense.

    Args:
        tensors: canonical name to kept entries.
        carried: canonical name to the dense fine-tuned tensor (a new head, tensors outside the scope).
        info: method, rate, seed, q, base.
        new_rows: canonical name to the rows that follow those in common with the base (a vocabulary that grew).
    """

    def __init__(
        self,
        tensors: dict[str, SparseTensor],
        carried: dict[str, Tensor],
        info: DeltaInfo,
        new_rows: dict[str, Tensor] | None = None,
    ) -> None:
        self.tensors = tensors
        self.carried = carried
        self.info = info
        self.new_rows = new_rows or {}
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
        dense = sum(t.numel() for part in (self.carried, self.new_rows) for t in part.values())
        return (self.num_kept + dense) / max(self.info.entries, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of ``delta_model.safetensors`` and ``delta_config.json`` as ``save_pretrained`` writes them."""
        from dpp_lightning.delta.folder import encode

        model, config = encode(self)
        return len(model) + len(config)

    def rescaled(self, q: float) -> SparseDelta:
        """The same kept entries under another q; shares all tensors, so it costs nothing.

        Raises:
            ValueError: q is not a finite number above 0.
        """
        info = replace(self.info, q=check_q(q, self.pruning_rate))
        return SparseDelta(self.tensors, self.carried, info, self.new_rows)

    def for_task(self, task: str) -> SparseDelta:
        """A merged delta as one of its tasks uses it, with that task's head; shares all tensors.

        Raises:
            ValueError: it merges no such task.
        """
        info, carried = of_task(self.info, self.carried, task)
        return SparseDelta(self.tensors, carried, info, self.new_rows)

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
        kept, values = self._kept_and_sums(found, target, force=force)
        for name, tensor in found.items():
            self._originals[tensor] = kept[name] if name in self.tensors else tensor.detach().clone()
            if name in self.new_rows:
                self._originals[tensor] = (kept[name], self._rows(name, tensor).clone())
        self._write_all(found, lambda name: (values.get(name), self.new_rows.get(name)))

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
            kept = {n: gather_entries(source[n], part.indices) for n, part in self.tensors.items()}
            originals: dict[str, Any] = {n: source[n].detach().clone() for n in self.carried} | kept
            originals |= {n: (kept[n], self._rows(n, source[n]).clone()) for n in self.new_rows}
        elif all(tensor in self._originals for tensor in found.values()):
            originals = {name: self._originals[tensor] for name, tensor in found.items()}
        else:
            raise RuntimeError(
                "this delta is not applied to the target, so there is nothing to revert; if it was applied in another "
                "process or by another SparseDelta object, pass base= with the base's weights"
            )
        pairs = {name: value if isinstance(value, tuple) else (value, None) for name, value in originals.items()}
        self._write_all(found, pairs.__getitem__)
        for tensor in found.values():
            self._originals.pop(tensor, None)

    @contextmanager
    def applied(self, target: TensorSource, *, force: bool = False) -> Iterator[None]:
        """``with delta.applied(model): ...`` applies on entry and reverts on exit, also after an exception."""
        self.apply_(target, force=force)
        try:
            yield
        finally:
            self.revert_(target)

    def to_absolute(self, base: TensorSource, *, force: bool = False) -> Iterator[AbsoluteEntries]:
        """The fine-tuned values at the kept entries, to overwrite them in an engine that holds the base. O(kept).

        Overwriting is idempotent, adding is not. Dense tensors are apart: :attr:`carried` holds them under canonical
        names. Rows that a vocabulary gained come as entries of the grown tensor.

        Args:
            base: module or state dict with the base's weights, in the dtype that the engine holds; read only.
            force: as for :meth:`apply_`.

        Yields:
            One :class:`AbsoluteEntries` for each pruned tensor with kept entries.

        Raises:
            ValueError: as :meth:`apply_`, before anything is yielded.
        """
        found, own = self._find(base), source_names(base)
        _, values = self._kept_and_sums(found, base, force=force)
        names = match_names(self.tensors, own)
        for name, part in self.tensors.items():
            value, indices, rows = values[name], part.indices.long(), self.new_rows.get(name)
            if rows is not None:
                first = found[name].numel() - rows.numel()
                indices = torch.cat([indices, torch.arange(first, found[name].numel())])
                value = torch.cat([value, rows.to(value).reshape(-1)])
            if indices.numel():
                tensor = found[name]
                yield AbsoluteEntries(own[names[name]], tuple(tensor.shape), tensor.dtype, value, indices)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        positions: str | None = None,
        scores: Mapping[str, float] | None = None,
        side_files: Mapping[str, Path | bytes] | None = None,
    ) -> Path:
        """Write ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card; whole or not at all.

        Args:
            folder: made if absent; an existing delta folder is replaced, a folder with anything else refused.
            dtype: how the kept values are held (float32, bfloat16, float16, int8, int4); default as drawn.
            positions: ``seed`` (no bytes; only a seeded selection) or ``index`` (coded near their entropy); default
                the smaller that is possible.
            scores: figures for the card, name to value.
            side_files: further files by name, as a path or their bytes, such as the fine-tuned ``config.json``.

        Raises:
            ValueError: unknown dtype or coding, or values that overflow the dtype.
            OSError: the folder cannot be written.
        """
        from dpp_lightning.delta.folder import write_folder

        return write_folder(
            self, Path(folder), dtype=dtype, positions=positions, scores=scores, side_files=side_files or {}
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> SparseDelta:
        """Read a delta from a local folder or a hub id, checking everything before use.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: a file that is damaged, hostile, or of a newer format.
        """
        from dpp_lightning.delta.reader import DeltaReader

        return DeltaReader.open(folder, revision).delta()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload pruned delta",
        **save_settings: Any,
    ) -> str:
        """Save to a temporary folder and upload it as a model repository of the hub.

        Args:
            repo_id: ``name`` or ``organisation/name``; made if absent.
            revision: branch to commit to.
            private, token, commit_message: as in ``huggingface_hub``.
            save_settings: as for :meth:`save_pretrained`.

        Returns:
            The address of the commit.
        """
        from dpp_lightning.storage.hub import upload_folder  # its client takes half a second to import

        with TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "delta", **save_settings)  # before the hub is asked
            return upload_folder(
                folder, repo_id, revision=revision, private=private, token=token, commit_message=commit_message
            )

    def _kept_and_sums(
        self, found: dict[str, Tensor], target: TensorSource, *, force: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per pruned tensor the target's values at the kept entries and theta_0 + value / q there, all checked."""
        shared = any(is_dtensor(tensor) for tensor in found.values())  # collectives have one order
        each = in_order if shared else over_threads
        kept = each(lambda name: gather_entries(found[name], self.tensors[name].indices), self._sizes(self.tensors))
        if not force:
            self._check_base(kept, target)
        sums: dict[str, Tensor] = {}
        for names in group_by_device_and_dtype(kept):
            total = add_rescaled(
                torch.cat([kept[n] for n in names]), torch.cat([self.tensors[n].values for n in names]), self.q
            )
            added = dict(zip(names, total.split([kept[n].numel() for n in names]), strict=True))
            if not bool(torch.isfinite(total.sum(dtype=torch.float64))):  # a single value would make the sum so
                wrong = [name for name, part in added.items() if not bool(torch.isfinite(part).all())]
                if wrong:
                    raise ValueError(
                        f"{wrong[0]}: theta_0 + value / q is not finite in {total.dtype} at q={self.q:g}; "
                        "use a wider dtype or a larger q"
                    )
            sums |= added
        return kept, sums

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the fine-tuned model."""
        if name in self.carried:
            return tuple(self.carried[name].shape)
        shape, rows = self.tensors[name].shape, self.new_rows.get(name)
        return shape if rows is None else (shape[0] + len(rows), *shape[1:])

    def _find(self, target: TensorSource) -> dict[str, Tensor]:
        """The target's tensors under this delta's names, shapes checked."""
        of_task(self.info, self.carried, None)  # a merged delta needs its task chosen
        shapes = {name: self._shape(name) for name in (*self.tensors, *self.carried)}
        return matched(shapes, canonical_tensors(target), describe_source(target), self.info)

    def _check_base(self, kept: dict[str, Tensor], target: TensorSource) -> None:
        digest = EntriesHash()
        for values in kept.values():
            digest.update(values)
        if digest.hexdigest() != self.info.base_check:
            raise ValueError(wrong_base(describe_source(target), digest.hexdigest(), self.info))

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach()[self.tensors[name].shape[0] :]

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        """How much there is to read or write of each tensor."""
        return {n: (self.tensors[n].values if n in self.tensors else self.carried[n]).numel() for n in names}

    def _write_all(self, found: dict[str, Tensor], value: Callable[[str], tuple[Tensor | None, Tensor | None]]) -> None:
        over_threads(lambda name: self._write(name, found[name], *value(name)), self._sizes(found))

    def _write(self, name: str, tensor: Tensor, values: Tensor | None, rows: Tensor | None) -> None:
        if name in self.carried:
            tensor.detach().copy_(shard_like(self.carried[name] if values is None else values, tensor))
            return
        assert values is not None
        scatter_entries(tensor, self.tensors[name].indices, values)
        if rows is not None:
            self._rows(name, tensor).copy_(rows)
