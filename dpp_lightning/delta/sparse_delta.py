"""SparseDelta: a pruned delta in memory, applied to a base, taken off again bit for bit, rescaled, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dpp_lightning.delta.contents import AbsoluteEntries, DeltaContents, DeltaInfo, SparseTensor
from dpp_lightning.delta.empty_delta import warn_if_empty
from dpp_lightning.delta.folder import DeltaReader, encode, save_folder
from dpp_lightning.delta.match_tensors import find_tensors, wrong_base_message
from dpp_lightning.methods.rescaling import check_q
from dpp_lightning.tensors.flat_entries import (
    EntriesHash,
    add_rescaled,
    gather_entries,
    group_by_device_and_dtype,
    scatter_entries,
)
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import NamedTensor, TensorSource, describe_source, named_tensors, source_names
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
        # a target's tensor to what was overwritten in it, by name: it may hold several tensors of the model's files
        self._originals: WeakIdKeyDictionary = WeakIdKeyDictionary()

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
        The target's values at the kept positions are held until ``revert_``; nothing is written if any check fails. A
        delta that changes nothing is warned of, unless it is forced.

        Args:
            target: module or state dict with the base's weights.
            force: apply although the target's values at the kept positions are not those of the delta's base.

        Raises:
            ValueError: tensors missing or of another shape, another base, or values that overflow the target's dtype.
            RuntimeError: this delta is applied to the target already.
        """
        targets, named = self.find_in(target)
        if any(name in self._originals.get(n.owner, ()) for name, n in named.items()):
            raise RuntimeError("this delta is already applied to the target; call revert_ first")
        if not force:
            warn_if_empty(self.contents, "this delta")
        base_values, sums = self._base_values_and_sums(targets, target, force=force)
        for name, originals in self._held(targets, base_values).items():
            self._originals.setdefault(named[name].owner, {})[name] = originals
        self._write_all(targets, named, {name: (sums.get(name), self.new_rows.get(name)) for name in targets})

    def revert_(self, target: TensorSource, *, base: TensorSource | None = None) -> None:
        """Take the delta off in place, bit for bit. O(kept).

        Args:
            target: module or state dict to which the delta is applied.
            base: where the original values come from if the delta was applied in another process.

        Raises:
            RuntimeError: the delta is not applied to the target and no ``base`` is given.
            ValueError: the base lacks tensors.
        """
        targets, named = self.find_in(target)
        if base is not None:
            sources, _ = self.find_in(base)
            kept = {name: gather_entries(sources[name], tensor.changed) for name, tensor in self.tensors.items()}
            originals = self._held(sources, kept)
        elif all(name in self._originals.get(n.owner, ()) for name, n in named.items()):
            originals = {name: self._originals[n.owner][name] for name, n in named.items()}
        else:
            raise RuntimeError(
                "this delta is not applied to the target, so there is nothing to revert; if it was applied in another "
                "process or by another SparseDelta object, pass base= with the base's weights"
            )
        self._write_all(targets, named, originals)
        for n in named.values():
            self._originals.pop(n.owner, None)

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
        (base_tensors, _), base_names = self.find_in(base), source_names(base)
        _, sums = self._base_values_and_sums(base_tensors, base, force=force)
        names = match_names(self.tensors, base_names)
        for name, sparse in self.tensors.items():
            tensor, values, indices, rows = (
                base_tensors[name],
                sums[name],
                sparse.changed.long(),
                self.new_rows.get(name),
            )
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
            dtype: how the kept values are held (float32, bfloat16, float16, float64, int8, int4); default as drawn.
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

    def _base_values_and_sums(
        self, targets: dict[str, Tensor], target: TensorSource, *, force: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per pruned tensor the target's values at the kept entries and theta_0 + value / q there, all checked."""
        in_shards = any(is_dtensor(tensor) for tensor in targets.values())
        for_each = in_order if in_shards else over_threads  # all ranks must call collectives in one order
        kept = for_each(
            lambda name: gather_entries(targets[name], self.tensors[name].changed), self._sizes(self.tensors)
        )
        if not force:
            self._check_base(kept, target)
        factored = {name: tensor for name, tensor in self.tensors.items() if tensor.factors is not None}
        sums = for_each(lambda n: add_rescaled(kept[n], *factored[n].change(self.q)), self._sizes(factored))
        self._check_finite(sums)
        for names in group_by_device_and_dtype({name: kept[name] for name in kept if name not in factored}):
            together = add_rescaled(
                torch.cat([kept[n] for n in names]), torch.cat([self.tensors[n].values for n in names]), self.q
            )
            group = dict(zip(names, together.split([kept[n].numel() for n in names]), strict=True))
            if not bool(torch.isfinite(together.sum(dtype=torch.float64))):  # a single value would make the sum so
                self._check_finite(group)
            sums |= group
        return kept, sums

    def _check_finite(self, sums: Mapping[str, Tensor]) -> None:
        for name, values in sums.items():
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{name}: theta_0 + value / q is not finite in {values.dtype} at q={self.q:g}; "
                    "use a wider dtype or a larger q"
                )

    def _check_base(self, kept: Mapping[str, Tensor], target: TensorSource) -> None:
        check = EntriesHash()
        for values in kept.values():
            check.update(values)
        if check.hexdigest() != self.info.base_check:
            raise ValueError(wrong_base_message(describe_source(target), check.hexdigest(), self.info))

    def find_in(self, target: TensorSource) -> tuple[dict[str, Tensor], dict[str, NamedTensor]]:
        """The target's tensors under this delta's names, shapes checked, and where they lie in the target."""
        self.contents.for_task(None)  # a merged delta needs its task chosen
        shapes = {name: self._finetuned_shape(name) for name in (*self.tensors, *self.carried)}
        named = [(n, n.tensor) for n in self._named(target, shapes.keys())]
        found = find_tensors(shapes, {n.name: t for n, t in named}, describe_source(target), self.info)
        by_tensor = {id(tensor): n for n, tensor in named}
        return found, {name: by_tensor[id(tensor)] for name, tensor in found.items()}

    def _named(self, target: TensorSource, names: Set[str]) -> list[NamedTensor]:
        """The target's tensors by their names in its files, or in memory where this delta is one of state dicts."""
        named = named_tensors(target)
        if isinstance(target, nn.Module) and not names <= {n.name for n in named}:
            in_memory = named_tensors(target, in_memory=True)
            return in_memory if names <= {n.name for n in in_memory} else named
        return named

    def _finetuned_shape(self, name: str) -> tuple[int, ...]:
        if name in self.carried:
            return tuple(self.carried[name].shape)
        shape, rows = self.tensors[name].shape, self.new_rows.get(name)
        return shape if rows is None else (shape[0] + len(rows), *shape[1:])

    def _held(
        self, tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Copies of all that applying overwrites: values at kept entries or of a carried tensor, and those of new
        rows."""
        return {
            name: (
                kept[name] if name in self.tensors else tensor.detach().clone(),
                self._rows(name, tensor).clone() if name in self.new_rows else None,
            )
            for name, tensor in tensors.items()
        }

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a target's tensor that the base's vocabulary does not have."""
        return tensor.detach()[self.tensors[name].shape[0] :]

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        """How much there is to read or write of each tensor."""
        return {n: self.tensors[n].num_changed if n in self.tensors else self.carried[n].numel() for n in names}

    def _write_all(
        self,
        targets: Mapping[str, Tensor],
        named: Mapping[str, NamedTensor],
        values: Mapping[str, tuple[Tensor | None, Tensor | None]],
    ) -> None:
        over_threads(lambda name: self._write(name, targets[name], *values[name]), self._sizes(targets))
        for name, tensor in targets.items():
            named[name].store(tensor)

    def _write(self, name: str, target: Tensor, values: Tensor | None, rows: Tensor | None) -> None:
        """Overwrite kept entries and new rows of a tensor, or all of a carried one (None: with what is carried)."""
        if name in self.carried:
            target.detach().copy_(shard_like(self.carried[name] if values is None else values, target))
            return
        assert values is not None
        scatter_entries(target, self.tensors[name].changed, values)
        if rows is not None:
            self._rows(name, target).copy_(rows)
