"""SparseDelta: a pruned delta in memory, applied to a base, taken off again bit for bit, rescaled, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dpp_lightning.delta.applied_state import AppliedState
from dpp_lightning.delta.contents import AbsoluteEntries, DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.empty_delta import warn_if_empty
from dpp_lightning.delta.folder import DeltaReader, encode, save_folder
from dpp_lightning.delta.locks import locked, modules_of
from dpp_lightning.delta.match_tensors import check_base, find_tensors, named_for
from dpp_lightning.delta.target import DeltaTarget, Values
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.tensors.flat_entries import add_rescaled, check_finite, group_by_device_and_dtype
from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import NamedTensor, TensorSource, describe_source, source_names

_EVER_APPLIED: WeakValueDictionary[int, SparseDelta] = WeakValueDictionary()  # by identity


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
        self._applied = AppliedState()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: what it is, and not what it is applied to."""
        return {**self.__dict__, "_applied": AppliedState()}

    def __repr__(self) -> str:
        """Method, rate, q, seed, base and counts in one line; reads no tensor."""
        info = self.info
        in_tensors = sum(prod(tensor.shape) for tensor in self.tensors.values())
        parts = [
            f"{info.method!r}, pruning_rate={info.pruning_rate:g}, q={info.q:.6g}, seed={info.seed}",
            f"{len(self.tensors)} tensors with {self.num_kept:,} of {in_tensors:,} entries kept",
            *([f"{self.num_factor_numbers:,} numbers in factors"] if self.num_factor_numbers else []),
            *([f"{len(self.carried)} carried"] if self.carried else []),
            *([f"{len(self.new_rows)} with new rows"] if self.new_rows else []),
            *([f"tasks={info.tasks}"] if info.tasks else []),
            f"dense model {info.dense_bytes:,} bytes",
            *([f"base={info.base_name!r}"] if info.base_name else []),
        ]
        return f"SparseDelta({', '.join(parts)})"

    @classmethod
    def from_contents(cls, contents: DeltaContents) -> SparseDelta:
        """All of a delta read into memory; dense tensors are copied, as they may be pages of a file or in use.

        Raises:
            ValueError: reading meets chunks that are damaged or hostile.
        """
        tensors = dict(contents.tensors())
        carried = {name: tensor.detach().clone() for name, tensor in contents.carried.items()}
        new_rows = {name: rows.detach().clone() for name, rows in contents.new_rows.items()}
        return cls(tensors, carried, contents.info(), new_rows)

    @classmethod
    def from_bytes(cls, model: bytes, config: bytes) -> SparseDelta:
        """The delta in the bytes of its two files, as :meth:`to_bytes` gives them.

        Raises:
            ValueError: bytes that are damaged, hostile, or of a newer format.
        """
        return cls.from_contents(DeltaReader.from_bytes(model, config).contents)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> SparseDelta:
        """Read a delta from a local folder or a hub id, checking everything before use.

        Raises:
            FileNotFoundError: no such folder, or a folder without a delta.
            ValueError: a file that is damaged, hostile, or of a newer format.
        """
        return cls.from_contents(DeltaReader.open(folder, revision).contents)

    @property
    def contents(self) -> DeltaContents:
        """All of the delta, as it is written and merged; shares all tensors."""
        table = [(name, tensor.shape) for name, tensor in self.tensors.items()]
        return DeltaContents(table, lambda: iter(self.tensors.items()), self.carried, self.new_rows, lambda: self.info)

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
    def num_factor_numbers(self) -> int:
        """Number of numbers in factors."""
        return sum(t.factors.numbers for t in self.tensors.values() if t.factors is not None)

    @property
    def density(self) -> float:
        """Stored numbers (kept, of factors, carried) over all entries of the model, in [0, 1]."""
        dense = sum(t.numel() for t in (*self.carried.values(), *self.new_rows.values()))
        return (self.num_kept + self.num_factor_numbers + dense) / max(self.info.entries, 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of ``delta_model.safetensors`` and ``delta_config.json`` as :meth:`save_pretrained` writes them."""
        model, config = self.to_bytes()
        return len(model) + len(config)

    def rescaled(self, q: float) -> SparseDelta:
        """The same kept entries under another q; shares all tensors, so it costs nothing.

        Raises:
            ValueError: q is not a finite number above 0.
        """
        return self.with_changes(q=check_q(q, self.pruning_rate))

    def with_changes(self, tensors: dict[str, SparseTensor] | None = None, **info: Any) -> SparseDelta:
        """The same delta with other tensors, or fields of its description; shares all else."""
        tensors = self.tensors if tensors is None else tensors
        return SparseDelta(tensors, self.carried, replace(self.info, **info), self.new_rows)

    def for_task(self, task: str) -> SparseDelta:
        """A merged delta as one of its tasks uses it, with that task's head; shares all tensors.

        Raises:
            ValueError: it merges no such task.
        """
        contents = self.contents.for_task(task)
        return SparseDelta(self.tensors, dict(contents.carried), contents.info(), self.new_rows)

    def apply_(self, target: TensorSource, *, force: bool = False) -> None:
        """Add the delta to a base in place: theta_0 + value / q at kept entries, the product of factors where there are
        any, carried tensors copied. O(kept), and O(entries) of tensors with factors.

        The sum is taken in float32 (float64 where the target or the values are that) and cast to the target's dtype.
        The target's values at the kept positions are held until ``revert_``. All or nothing: if a check fails nothing
        is written, and after an interrupt or an error the base is back, bit for bit. A delta that changes nothing is
        warned of, unless it is forced. Threads that share a module (not a state dict) take turns; a forward is guarded
        by :meth:`applied` alone.

        Args:
            target: module or state dict with the base's weights.
            force: apply although the target's values at the kept positions are not those of the delta's base.

        Raises:
            ValueError: tensors missing or of another shape, another base, values that overflow the target's dtype, or
                tensors that cannot be overwritten.
            RuntimeError: this delta is applied to the target already, or another one is and this one is not forced.
        """
        if not force:
            warn_if_empty(self.contents, "this delta")
        with locked(modules_of(target)), locked([self]):
            self._apply(self._target(target), target, force=force)

    def _apply(self, place: DeltaTarget, target: TensorSource, *, force: bool) -> None:
        if self._applied.touches(place.named):
            raise RuntimeError("this delta is already applied to the target; call revert_ first")
        _EVER_APPLIED[id(self)] = self
        known = [] if force else [delta for ref in _EVER_APPLIED.valuerefs() if (delta := ref()) is not None]
        if others := [delta for delta in known if delta is not self and delta._applied.touches(place.named)]:
            raise RuntimeError(
                f"another delta is applied to the target: {others[0]!r}; take it off first (revert_), or force this "
                "one on top of it (force=True)"
            )
        place.check_writable()
        entries = place.entries()
        if not force:
            check_base(entries.values(), self.contents, target, describe_source(target))
        applied, originals = place.fitted(self._applied_values(place, entries)), place.held(entries)
        before, after = self._applied, self._applied.including(place.named, originals)
        try:
            self._applied = after
            place.write(applied)
        except BaseException:
            place.write(originals)
            self._applied = before
            raise

    def revert_(self, target: TensorSource, *, base: TensorSource | None = None) -> None:
        """Take the delta off in place, bit for bit. O(kept).

        A target that was cast or moved while the delta was applied gets the base's values in its dtype, on its device.
        All or nothing: after an interrupt or an error the delta is applied as before, and can be taken off again.

        Args:
            target: module or state dict to which the delta is applied.
            base: where the original values come from if the delta was applied in another process.

        Raises:
            RuntimeError: the delta is not applied to the target and no ``base`` is given.
            ValueError: the base lacks tensors, or the target's tensors cannot be overwritten.
        """
        with locked(modules_of(target)), locked([self]):
            self._revert(self._target(target), base)

    def _revert(self, place: DeltaTarget, base: TensorSource | None) -> None:
        originals = self._applied.originals(place.named) if base is None else self._originals_of(base)
        if originals is None:
            raise RuntimeError(
                "this delta is not applied to the target, so there is nothing to revert; if it was applied in another "
                "process or by another SparseDelta object, pass base= with the base's weights"
            )
        place.check_writable()
        fitted = place.fitted(originals)
        before, after = self._applied, self._applied.without(place.named)
        try:
            place.write(fitted)
            self._applied = after
        except BaseException:
            self._applied = before
            entries = {name: originals[name][0] for name in self.tensors}
            place.write(place.fitted(self._applied_values(place, entries)))
            raise

    @property
    def is_applied(self) -> bool:
        """Whether it is applied to a target that still exists."""
        return bool(self._applied)

    @contextmanager
    def applied(self, target: TensorSource, *, force: bool = False) -> Iterator[None]:
        """``with delta.applied(model): ...`` applies on entry and reverts on exit, also after an exception.

        The block holds the model's lock: another thread's ``applied``, ``apply_`` or ``revert_`` on the model waits
        for its end. A thread that uses two models at once takes them in the same order as all others.
        """
        with locked(modules_of(target)):
            with locked([self]):
                place = self._target(target)
                named, before = place.named, self._applied.touches(place.named)

            def revert() -> None:
                if not before and self._applied.touches(named):
                    self.revert_(target)

            if not force:
                warn_if_empty(self.contents, "this delta")
            with restored_after(revert):
                with locked([self]):
                    self._apply(place, target, force=force)
                del place  # it may hold copies
                yield

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
        place, base_names = self._target(base), source_names(base)
        entries = place.entries()
        if not force:
            check_base(entries.values(), self.contents, base, describe_source(base))
        sums = self._sums(place, entries)
        names = match_names(self.tensors, base_names)
        for name, sparse in self.tensors.items():
            tensor, values, indices = place.found[name], sums[name], sparse.changed.long()
            rows = self.new_rows.get(name)
            if rows is not None:
                indices = torch.cat([indices, torch.arange(tensor.numel() - rows.numel(), tensor.numel())])
                values = torch.cat([values, rows.to(values).reshape(-1)])
            if indices.numel():
                yield AbsoluteEntries(base_names[names[name]], tuple(tensor.shape), tensor.dtype, values, indices)

    def to_bytes(self, *, dtype: str | torch.dtype | None = None, positions: str | None = None) -> tuple[bytes, bytes]:
        """The delta as the bytes of ``delta_model.safetensors`` and ``delta_config.json``.

        Args:
            dtype, positions: as for :meth:`save_pretrained`.

        Raises:
            ValueError: as :meth:`save_pretrained`.
        """
        return encode(self.contents, dtype, positions)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        positions: str | None = None,
        scores: Mapping[str, float] | None = None,
        reference_scores: Mapping[str, float] | None = None,
        side_files: Mapping[str, Path | bytes | None] | None = None,
    ) -> Path:
        """Write ``delta_model.safetensors``, ``delta_config.json`` and a ``README.md`` card; whole or not at all.

        Args:
            folder: made if absent; an older delta in it is replaced. One that holds other files, beside an older delta
                too, is refused; ``side_files`` may have been among the older delta's.
            dtype: how the kept values are held (float32, bfloat16, float16, float64, int8, int4, int3, int2); default
                as drawn.
            positions: ``seed`` (no bytes; only a seeded selection) or ``index`` (coded near their entropy); default
                the smaller that is possible.
            scores: figures of base plus delta for the card and its ``model-index``, name to value, such as
                ``{"val_acc": 0.91}``.
            reference_scores: figures of other models for the card's table alone, such as ``{"base": 0.52}``.
            side_files: further files by name, as a path or their bytes, such as the fine-tuned ``config.json``; None
                for one of the base's that the fine-tuned model does not have.

        Raises:
            ValueError: unknown dtype or coding, or values that overflow the dtype.
            FileExistsError: the folder holds something other than a delta, which the message names.
            OSError: the folder cannot be written.
        """
        return save_folder(
            self.contents,
            Path(folder),
            dtype=dtype,
            positions=positions,
            scores=scores,
            reference_scores=reference_scores,
            side_files=side_files,
        )

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
            private, token, commit_message: as in :func:`dpp_lightning.storage.hub.upload_folder`.
            save_settings: as for :meth:`save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as :meth:`save_pretrained`, before the hub is asked, or a malformed ``repo_id``.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses, for example for want of a valid token.
        """
        from dpp_lightning.storage.hub import upload_folder  # its client takes half a second to import

        with TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "delta", **save_settings)
            return upload_folder(
                folder, repo_id, revision=revision, private=private, token=token, commit_message=commit_message
            )

    def _target(self, target: TensorSource) -> DeltaTarget:
        return DeltaTarget(*self.find_in(target), self.tensors, self.new_rows)

    def _originals_of(self, base: TensorSource) -> dict[str, Values]:
        """What the base has at all that applying overwrites."""
        place = self._target(base)
        return place.held(place.entries())

    def _applied_values(self, place: DeltaTarget, entries: Mapping[str, Tensor]) -> dict[str, Values]:
        """What applying writes, given the base's values at the entries that change."""
        sums = self._sums(place, entries)
        return {n: (sums[n] if n in sums else self.carried[n], self.new_rows.get(n)) for n in place.found}

    def _sums(self, place: DeltaTarget, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """theta_0 + value / q of every pruned tensor at the entries that change, all finite."""
        factored = [name for name, tensor in self.tensors.items() if tensor.factors is not None]
        sums = place.over_tensors(lambda n: add_rescaled(entries[n], *self.tensors[n].change(self.q)), factored)
        check_finite(sums, self.q)
        for names in group_by_device_and_dtype({name: entries[name] for name in entries if name not in sums}):
            together = add_rescaled(
                torch.cat([entries[n] for n in names]), torch.cat([self.tensors[n].values for n in names]), self.q
            )
            group = dict(zip(names, together.split([entries[n].numel() for n in names]), strict=True))
            if not bool(torch.isfinite(together.sum(dtype=torch.float64))):  # a single value would make the sum so
                check_finite(group, self.q)
            sums |= group
        return sums

    def find_in(self, target: TensorSource) -> tuple[dict[str, Tensor], dict[str, NamedTensor]]:
        """The target's tensors under this delta's names, shapes checked, and where they lie in the target."""
        self.contents.for_task(None)  # a merged delta needs its task chosen
        shapes = {name: self._finetuned_shape(name) for name in (*self.tensors, *self.carried)}
        named = [(n, n.tensor) for n in named_for(target, shapes.keys())]
        found = find_tensors(shapes, {n.name: t for n, t in named}, describe_source(target), self.info)
        by_tensor = {id(tensor): n for n, tensor in named}
        return found, {name: by_tensor[id(tensor)] for name, tensor in found.items()}

    def _finetuned_shape(self, name: str) -> tuple[int, ...]:
        if name in self.carried:
            return tuple(self.carried[name].shape)
        shape, rows = self.tensors[name].shape, self.new_rows.get(name)
        return shape if rows is None else (shape[0] + len(rows), *shape[1:])
