"""The one road from two models to a delta: match them by name, draw by a spec, fit on calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from dpp_lightning.calibration.calibration_data import CalibrationSource
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, Report, cast
from dpp_lightning.delta.contents import DeltaInfo, SparseTensor
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.pruning.adapter_check import check_merged
from dpp_lightning.pruning.coverage import rate_among, uncovered
from dpp_lightning.pruning.expert_forms import check_expert_forms
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.scope import Fate, Scope
from dpp_lightning.pruning.shape_check import check_shapes
from dpp_lightning.pruning.unchanged import same_values, without_idle
from dpp_lightning.pruning.value_checks import ValueChecks
from dpp_lightning.storage.checkpoints import total_bytes
from dpp_lightning.storage.safe_text import printable
from dpp_lightning.tensors.dtypes import FLOATS, exact_dtype, to_dtype
from dpp_lightning.tensors.fingerprint import combine_hashes, hash_tensor
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries, samples_of
from dpp_lightning.tensors.name_matching import match_models, match_names, saved_names
from dpp_lightning.tensors.names import (
    NamedTensor,
    TensorSource,
    buffers_among,
    check_prunable,
    has_file_names,
    named_tensors,
)
from dpp_lightning.tensors.quantised import check_not_quantised
from dpp_lightning.tensors.shards import full_tensor, is_dtensor
from dpp_lightning.tensors.threads import in_order, over_threads


@dataclass(frozen=True)
class PruningPlan:
    """Two sets of weights matched by name, with the fate of every tensor: what all masks of one pair have in common.

    Attributes:
        base, finetuned: canonical name (of the fine-tuned side) to tensor, possibly mapped from a file; never written.
        fates: what becomes of each fine-tuned tensor.
        unchanged: names of tensors that training left as they were.
        scope: the settings that the fates come from.
        base_name, base_revision: for the file.
        prefix, names: how the fine-tuned model's own names follow from the canonical ones, see :class:`DeltaInfo`.
        ignored: base tensors that the fine-tuned model does not have.
        inputs: what weights see as input on calibration data, by canonical name; for methods that ask for it.
        entries_in_scope: entries of the tensors that the scope prunes, where a method covers only some of them and the
            rate is still of all; None where it covers all.
    """

    base: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    fates: dict[str, Fate]
    unchanged: frozenset[str]
    scope: Scope
    base_name: str | None = None
    base_revision: str | None = None
    prefix: str = ""
    names: Mapping[str, str] | None = None
    ignored: tuple[str, ...] = ()
    inputs: Mapping[str, InputStatistics] | None = None
    entries_in_scope: int | None = None

    @classmethod
    def of(
        cls,
        base: TensorSource,
        finetuned: TensorSource,
        scope: Scope,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        files: bool = False,
    ) -> PruningPlan:
        """Match the two and decide every tensor's fate.

        Args:
            base, finetuned: modules or state dicts.
            scope: which tensors are pruned.
            base_name, base_revision: for the file.
            files: the fine-tuned names are those of the model's own files, to the letter.

        Raises:
            ValueError: weights that cannot be pruned, layers that only one side has, adapters, or nothing in common.
        """
        check_merged(finetuned, base)
        all_base = named_tensors(base, like=finetuned)
        named, base_named = match_models(named_tensors(finetuned, like=base), all_base)
        exact, in_base = files or has_file_names(finetuned), {name: n.saved for name, n in base_named.items()}
        prefix, file_names = saved_names(named, in_base, exact=exact)
        matched = {name: n.tensor for name, n in base_named.items()}
        known = {n.name for n in base_named.values()}
        ignored = {n.name: n.tensor for n in all_base if n.name not in known}
        check_expert_forms([n.name for n in named if n.name not in base_named], ignored)
        weights, scope = {n.name: n.tensor for n in named}, scope.carrying(buffers_among(named, finetuned))
        plan = cls.matched(matched, weights, scope, named, ignored, base_name=base_name, base_revision=base_revision)
        return replace(plan, prefix=prefix, names=file_names)

    @classmethod
    def matched(
        cls,
        base: dict[str, Tensor],
        finetuned: dict[str, Tensor],
        scope: Scope,
        named: Iterable[NamedTensor],
        ignored: Mapping[str, Tensor] | None = None,
        *,
        base_name: str | None = None,
        base_revision: str | None = None,
        saved: tuple[str, dict[str, str]] = ("", {}),
    ) -> PruningPlan:
        """Decide every tensor's fate, where the two sides have the same names already.

        Args:
            base, finetuned: canonical name to tensor; the fine-tuned model may have further ones.
            scope, base_name, base_revision: as for :meth:`of`.
            named: the fine-tuned tensors, which say what is no part of the model proper.
            ignored: tensors of the base that the fine-tuned model does not have.
            saved: the fine-tuned model's names, of :func:`dpp_lightning.tensors.name_matching.saved_names`.

        Raises:
            ValueError: as :meth:`of`.
        """
        check_prunable(finetuned)
        check_not_quantised({**(ignored or {}), **base}, "the base")
        check_shapes(base, finetuned, scope)
        fates = scope.fates(base, finetuned, ignored)
        finetuned = without_idle(finetuned, named, base)
        return cls(
            base=base,
            finetuned=finetuned,
            fates={name: fates[name] for name in finetuned},
            unchanged=frozenset(n for n, t in finetuned.items() if n in base and same_values(t, base[n])),
            scope=scope,
            base_name=base_name,
            base_revision=base_revision,
            prefix=saved[0],
            names=saved[1],
            ignored=tuple(ignored or ()),
        )

    @property
    def pruned(self) -> list[str]:
        """Names of the tensors whose delta is pruned, sorted, so that one pair of models gives one file however it was
        held; those that training left as they were have none."""
        return sorted(name for name, fate in self.fates.items() if fate == "prune" and name not in self.unchanged)

    @cached_property
    def checks(self) -> ValueChecks:
        """What is checked of the values; what was checked once is not read again."""
        return ValueChecks(self.base, self.finetuned, self.fates, self.unchanged)

    @cached_property
    def pairs(self) -> list[TensorPair]:
        """The pruned tensors, both sides."""
        known, scope = self.inputs or {}, self.scope
        return [
            TensorPair.of(
                name,
                self.base[name],
                self.finetuned[name],
                known.get(name),
                block=scope.block_of(name),
                linear=scope.is_linear_map(name, self.finetuned[name].shape),
            )
            for name in self.pruned
        ]

    def with_inputs(self, inputs: Mapping[str, InputStatistics]) -> PruningPlan:
        """This plan, knowing the inputs of its weights, whatever the names' leading parts.

        Raises:
            ValueError: the inputs are of another model, whose weights have other shapes.
        """
        names = match_names(self.pruned, inputs)
        for name, name_in_inputs in names.items():
            if not inputs[name_in_inputs].fits(self.finetuned[name].shape):
                raise ValueError(
                    f"{name}: inputs of {tuple(inputs[name_in_inputs].total.shape)} features do not belong to a weight "
                    f"of shape {tuple(self.finetuned[name].shape)}; collect them from the fine-tuned model itself"
                )
        return replace(self, inputs={name: inputs[name_in_inputs] for name, name_in_inputs in names.items()})

    def covering(self, spec: PruningSpec) -> PruningPlan:
        """This plan with the tensors that the spec's method leaves out reverted to the base; the rate stays of all.

        Raises:
            ValueError: the method covers no tensor, leaves out one whose vocabulary grew, or the rate keeps more than
                the tensors that it covers have.
        """
        if spec.row.covers is None or self.entries_in_scope is not None:
            return self
        shapes = {name: tuple(self.finetuned[name].shape) for name in self.pruned}
        left_out = frozenset(uncovered(spec, shapes, self.new_rows))
        if left_out not in self._coverings:
            fates: dict[str, Fate] = {**self.fates, **dict.fromkeys(left_out, "revert")}
            plan = replace(self, fates=fates, entries_in_scope=sum(map(prod, shapes.values())))
            plan.__dict__["_digests"] = self._digests  # of the base, which is the same
            self._coverings[left_out] = plan
        plan = self._coverings[left_out]
        plan.drawn_rate(spec)
        return plan

    @cached_property
    def _coverings(self) -> dict[frozenset[str], PruningPlan]:
        """The plans that leave out some tensors, by their names: what one has read serves every rate and seed."""
        return {}

    def rate_of(self, spec: PruningSpec) -> float:
        """The fraction of the entries in scope that the spec drops: its pruning rate, unless settings say otherwise."""
        if spec.row.numbers is None:
            return float(spec.pruning_rate)
        plan = self.covering(spec)
        shapes = [pair.shape for pair in plan.pairs]
        numbers = spec.row.numbers(shapes, plan.drawn_rate(spec), spec.method_settings)
        return max(0.0, 1 - numbers / max(plan.entries_in_scope or sum(map(prod, shapes)), 1))

    def drawn_rate(self, spec: PruningSpec) -> float:
        """The rate among the tensors that the method covers, at which the entries in scope have the pruning rate.

        Raises:
            ValueError: the rate keeps more than these tensors have.
        """
        if self.entries_in_scope is None:
            return float(spec.pruning_rate)
        covered = sum(self.finetuned[name].numel() for name in self.pruned)
        return rate_among(spec, covered, self.entries_in_scope)

    def for_spec(self, spec: PruningSpec, calibration: CalibrationSource | None) -> PruningPlan:
        """This plan, knowing what the layers see as input where the spec needs that; warns of linear maps of which it
        is not known.

        Raises:
            ValueError: the method cannot do without calibration data, and there is none, or it does not reach most of
                the linear maps.
        """
        covering, wanted = self.covering(spec), spec.needs_inputs or spec.needs_moments
        if calibration is not None and wanted:
            covering.read_all()  # before the model runs
        inputs = calibration.layer_inputs(products=spec.needs_moments) if calibration is not None and wanted else None
        spec.check_calibration(objective=calibration is not None, inputs=bool(inputs))
        if not inputs:
            return covering
        plan = covering.with_inputs(inputs)
        unknown = unknown_inputs(plan.pairs, spec.method, spec.method_settings)
        if unknown:
            warnings.warn(unknown, stacklevel=2)
        return plan

    @property
    def carried(self) -> dict[str, Tensor]:
        """Tensors that are stored dense."""
        return {n: self.finetuned[n] for n, fate in self.fates.items() if fate == "carry" and n not in self.unchanged}

    @property
    def new_rows(self) -> dict[str, Tensor]:
        """The rows that a pruned tensor has beyond those of the base."""
        grown = [n for n in self.pruned if self.finetuned[n].dim() and len(self.finetuned[n]) > len(self.base[n])]
        return {name: self.finetuned[name][len(self.base[name]) :] for name in grown}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def digest(self, name: str) -> str:
        """xxh3-128 of one tensor of the base."""
        if name not in self._digests:
            self._digests[name] = hash_tensor(name, self.base[name])
        return self._digests[name]

    def read(self, name: str) -> None:
        """Hash a pruned tensor of the base and check that both sides are finite, once in the life of the plan.

        Raises:
            ValueError: NaN or infinity in either model; the message names all such tensors.
        """
        self.digest(name)
        self.checks.check_finite(name)

    def read_all(self) -> None:
        """:meth:`read` of all pruned tensors, in several threads, and the check of those that are carried.

        Raises:
            ValueError: as :meth:`read`.
        """
        in_shards = any(is_dtensor(self.finetuned[name]) for name in self.pruned)
        for_each = in_order if in_shards else over_threads  # all ranks must call collectives in one order
        for_each(self.read, {name: self.finetuned[name].numel() for name in self.pruned})
        self.checks.check_carried_finite()

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of the base's tensors that are not carried; each is read once in the life of the plan."""
        return combine_hashes({name: self.digest(name) for name, fate in self.fates.items() if fate != "carry"})

    @property
    def replaced_base(self) -> dict[str, Tensor]:
        """The base's value of every tensor that a pruned model does not carry: those that are pruned or reverted."""
        return {n: self.base[n] for n, fate in self.fates.items() if fate != "carry" and n not in self.unchanged}

    def stream(self, spec: PruningSpec, *, final: bool = False) -> Iterator[tuple[str, SparseTensor, Tensor]]:
        """The kept entries of one pruned tensor after the other, with the base's values where it changes.

        Args:
            spec: what is drawn, of a plan that is :meth:`covering` it; values are in its ``drawn_dtype``.
            final: nothing will be fitted, so that values and factors are drawn as the file holds them.

        Raises:
            ValueError: the method needs the layers' inputs and the plan has none, or values that overflow the dtype.
        """
        spec.check_calibration(objective=True, inputs=bool(self.inputs))
        settings = spec.row.selection_settings(spec.method_settings)
        selected = spec.row.select(self.pairs, self.drawn_rate(spec), spec.seed, **settings)
        for pair, kept in zip(self.pairs, selected, strict=True):
            base = gather_entries(pair.base, kept.positions)
            values, dtype, wide = kept.values, spec.dtype if final else spec.drawn_dtype, torch.float32
            if spec.exact:  # whatever the method, all entries are kept as they are
                values, dtype = None, exact_dtype(pair.base.dtype, pair.finetuned.dtype)
                wide = FLOATS[dtype]
            if values is None:
                values = gather_entries(pair.finetuned, kept.positions).to(wide)
                values -= base.to(values.device, wide)
            indices = kept.positions.to(torch.int32) if pair.numel < 2**31 else kept.positions
            values, factors = to_dtype(values, dtype, pair.finetuned, pair.name), kept.factors
            if factors is not None:
                factors = factors.rounded(spec.factors_dtype, pair.name) if final else factors
                base = full_tensor(pair.base).reshape(-1)
            yield pair.name, SparseTensor(pair.shape, indices, values, factors), base

    def draw(self, spec: PruningSpec) -> SparseDelta:
        """One pruned delta in memory; q is the method's first candidate.

        Raises:
            ValueError: as :meth:`stream`, or NaN or infinity in either model.
        """
        plan = self.covering(spec)
        plan.read_all()
        tensors, check = {}, EntriesHash()
        for name, kept, base in plan.stream(spec):
            tensors[name] = kept
            check.update(base)
        carried = {name: full_tensor(tensor.detach()).clone() for name, tensor in plan.carried.items()}
        rows = {name: tensor.detach().clone() for name, tensor in plan.new_rows.items()}
        return SparseDelta(tensors, carried, plan.info(spec, check), rows)

    def fit(
        self,
        spec: PruningSpec,
        delta: SparseDelta,
        calibration: CalibrationSource | None,
        *,
        report: Report | None = None,
    ) -> FoundRescaling | None:
        """What the spec's method finds on calibration data; None where it fits nothing, or there is no data or delta.

        Args:
            spec: what the delta was drawn by.
            delta: one mask, as :meth:`draw` gives it.
            calibration: what the fit goes by.
            report: called with what is tried.

        Raises:
            ValueError: the method cannot do without an objective, inputs or gradients that the data does not give.
        """
        if spec.fit is None or calibration is None or not self.pruned:
            return None
        plan = self.covering(spec)
        gradients, training = spec.fit.needs_gradients, spec.fit.needs_distillation
        objective = calibration.objective(plan.replaced_base, gradients=gradients, distillation=training)
        if objective is None:
            spec.check_calibration(objective=False, inputs=True)
            return None
        return Calibrator(plan.pairs, objective, spec.dtype, report).fit(delta)

    def draw_and_fit(
        self,
        spec: PruningSpec,
        calibration: CalibrationSource | None = None,
        rescaling: FoundRescaling | None = None,
        *,
        report: Report | None = None,
    ) -> tuple[SparseDelta, FoundRescaling | None]:
        """One pruned delta, with the q or weights that its method finds.

        Args:
            spec: what is drawn; a plan that does not know the layers' inputs yet learns them by :meth:`for_spec`.
            calibration: what a fit goes by; None leaves q at the method's own.
            rescaling: what was found on another mask of the same method and rate; nothing is fitted then.
            report: called with what is tried.

        Returns:
            The delta, its values in the spec's dtype, and what was found for it.

        Raises:
            ValueError: see :meth:`stream` and :meth:`fit`.
        """
        if spec.row.fit is not None and spec.row.fit.draws:
            spec.check_calibration(objective=calibration is not None, inputs=True)
            return spec.row.fit.function(self, spec, calibration, report)
        delta = self.draw(spec)
        if spec.q is not None:
            return delta.rescaled(spec.q), None
        rescaling = rescaling or self.fit(spec, delta, calibration, report=report)
        if rescaling is not None:
            delta = rescaling.apply(delta)
        return cast(delta, self.covering(spec).pairs, spec), rescaling

    def info(self, spec: PruningSpec, check: EntriesHash, *, final: bool = False) -> DeltaInfo:
        """What the delta says of itself; ``check``: of the base where it changes; ``final``: as for :meth:`stream`."""
        rate = self.rate_of(spec)
        drawn_rate = spec.rest if spec.rest < 1 else self.drawn_rate(spec)
        alone = {n: None for n, fate in self.fates.items() if n in self.unchanged or fate == "revert"}
        return DeltaInfo(
            method=spec.method,
            pruning_rate=rate,
            seed=spec.seed,
            q=spec.row.rescale(spec.pruning_rate),
            seeded=spec.seeded,
            base_name=self.base_name and printable(self.base_name),
            base_revision=self.base_revision,
            base_fingerprint=self.fingerprint,
            base_check=check.hexdigest(samples_of(self.base, {**alone, **{p.name: p.shape for p in self.pairs}})),
            base_first=check.first,
            entries=sum(t.numel() for t in self.finetuned.values()),
            dense_bytes=total_bytes(self.finetuned),
            dtype=spec.dtype if final else spec.drawn_dtype,
            factors_dtype=spec.factors_dtype if final else None,
            drawn_rate=drawn_rate if spec.seeded and drawn_rate != rate else None,
            rest=spec.rest < 1,
            scope={k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.scope).items()},
            settings=dict(spec.method_settings),
            reverted=tuple(sorted(n for n, f in self.fates.items() if f == "revert" and n not in self.unchanged)),
            unchanged=tuple(sorted(n for n in self.finetuned if n in self.unchanged)),
            prefix=self.prefix,
            names=dict(sorted((self.names or {}).items())),
        )
