"""``auto``: of all forms of a delta within some bytes the one with the least loss on held-out calibration data.

No form is best everywhere: products of factors carry what AdamW changes, samples of entries what AdamR changes, and
weighted factors are better on one task and plain ones on another. So every form is made on the models at hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from dpp_lightning.calibration.calibration_data import CalibrationSource, Objective
from dpp_lightning.calibration.fit_rescaling import Calibrator, FoundRescaling, Report, cast
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.methods.training import Training
from dpp_lightning.pruning.coverage import least_rate
from dpp_lightning.pruning.plan import PruningPlan

_IMPORTANCE_BITS = 9.0  # a kept entry, to begin with
_BITS = {"int2": 2.0, "int4": 4.6}  # a trained value, or a number of a factor
_MANY = 0.5  # of the entries: below it more numbers of few bits are better than fewer that are finer
_LEAST_RATE = 1e-6  # nothing dropped is no form
_LEAST_REST = 0.5  # of a rest: with more entries it is the delta itself
_TRIES = 8  # of a rate, until its bytes are at most those wanted and nearly as many
_FITS = 3  # of a form, until the fitted one is within the bytes too
_NEAR, _AIM = 0.95, 0.98  # of the bytes: a larger delta would hardly be better
_SPARE = 0.98  # of the bytes for forms that are trained: trained values may take a little more than drawn ones
_COMPARED, _TRAINED = 350, 150  # bytes of what a delta says of the forms it was compared with, and of its training
_FIRST_BUDGET = 20_000  # bytes that are tried first where a loss is wanted
_OF_BASE = 2.0  # the base's loss


@dataclass(frozen=True)
class Form:
    """One form of the delta that was tried.

    Attributes:
        name: what it is, such as ``lowrank, trained``.
        delta: it, as the file holds it.
        num_bytes: of its two files.
        loss: on held-out calibration data; 1 is the base's, 0 the fine-tuned model's, for each of outputs and hidden
            states.
    """

    name: str
    delta: SparseDelta
    num_bytes: int
    loss: float

    def __str__(self) -> str:
        return f"{self.name}: {self.num_bytes:,} bytes, loss {self.loss:.4f}"


def choose(
    plan: PruningPlan, spec: PruningSpec, calibration: CalibrationSource | None, report: Report | None = None
) -> tuple[SparseDelta, FoundRescaling]:
    """The best form within ``max_bytes``, or the smallest within ``max_loss``.

    Args:
        plan: the two models.
        spec: of method ``auto``: its seed, and ``max_bytes`` or ``max_loss`` among its settings.
        calibration: data that forms are trained on, of which an eighth is held out to compare them.
        report: called with what is tried.

    Returns:
        The delta, which says in ``info.training["compared"]`` what it was compared with, and the losses.

    Raises:
        ValueError: calibration that does not train, or no form within the limit.
    """
    max_bytes, max_loss = spec.method_settings.get("max_bytes", 0), spec.method_settings.get("max_loss", 0)
    assert calibration is not None
    if not plan.pruned:  # what is carried is all there is, whatever the form
        return plan.draw(PruningSpec("importance", seed=spec.seed)), FoundRescaling(lambda delta: delta, ())
    known = plan if plan.inputs is not None else plan.for_spec(spec, calibration)
    known.read_all()
    objective = calibration.objective(known.replaced_base, gradients=False, distillation=True)
    if objective is None or objective.distillation is None:
        raise ValueError("auto compares forms on calibration data, which this source does not give")
    search = _Search(known, spec, objective, report)
    forms = search.within_bytes(int(max_bytes)) if max_bytes else search.within_loss(float(max_loss))
    within = [form for form in forms if max_bytes or form.loss <= max_loss]
    best = min(within or forms, key=lambda form: form.loss if max_bytes or not within else form.num_bytes)
    if not within:
        raise ValueError(f"auto found no form with a held-out loss of {max_loss:g} or less; the best was {best}")
    if best.loss >= _OF_BASE:
        warnings.warn(f"the best form is no better than the base ({best}): give it more bytes", stacklevel=2)
    said = {**best.delta.info.training, "compared": [*map(str, forms), *(search.left_out if max_bytes else ())]}
    found = best.delta.with_changes(training=said)
    return found, FoundRescaling(lambda _: found, tuple((float(f.num_bytes), f.loss) for f in forms))


@dataclass(frozen=True)
class _Search:
    """The forms of one pair of models."""

    plan: PruningPlan
    spec: PruningSpec
    objective: Objective
    report: Report | None = None
    left_out: list[str] = field(default_factory=list)

    def within_loss(self, max_loss: float) -> list[Form]:
        """Forms of twice as many bytes each time, until one has that loss or less; of half as many, while one has."""

        def tried(budget: int) -> bool:
            try:
                found = self.within_bytes(budget)
            except ValueError as refusal:  # not one form within so few bytes
                refusals.append(str(refusal))
                return False
            forms.extend(found)
            return min(form.loss for form in found) <= max_loss

        budget = max(_FIRST_BUDGET, self._plan_bytes // 1000)
        forms: list[Form] = []
        refusals: list[str] = []
        if tried(budget):
            while tried(budget := budget // 2):
                pass
        else:
            while budget < self._plan_bytes and not tried(budget := 2 * budget):
                pass
        if not forms:
            raise ValueError(refusals[-1])
        return forms

    @property
    def _plan_bytes(self) -> int:
        """Bytes of a delta that keeps everything in 16 bits, with what is carried: nobody wants more."""
        of_pruned = 2 * sum(self.plan.finetuned[name].numel() for name in self.plan.pruned)
        return of_pruned + sum(tensor.numel() * tensor.element_size() for tensor in self.plan.carried.values())

    def within_bytes(self, max_bytes: int) -> list[Form]:
        """All forms of at most that many bytes, with what the best of them says of the others.

        Raises:
            ValueError: not one of them.
        """
        forms, refusals = [], []
        for name, make in self._families():
            try:
                forms.append(self._form(name, make, max_bytes - _COMPARED))
            except ValueError as refusal:
                refusals.append(f"{name}: {refusal}")
                self.left_out.append(f"{name}: none within {max_bytes:,} bytes")
        if not forms:
            raise ValueError(
                f"auto found no form of at most {max_bytes:,} bytes, {_COMPARED} of them for what the delta says "
                f"of the forms: {'; '.join(refusals)}"
            )
        return forms

    def _families(self) -> Iterator[tuple[str, Callable[[float], PruningSpec]]]:
        """Name and, for a number of bytes, the spec of every form."""
        yield "importance", lambda size: self._spec("importance", size)
        yield "refit", lambda size: self._spec("refit", size * _SPARE - _TRAINED)
        yield "lowrank", lambda size: self._spec("lowrank", size * _SPARE - _TRAINED)
        yield "lowrank and a rest", lambda size: self._with_rest(size * _SPARE - _TRAINED)

    def _spec(self, method: str, size: float, **settings: Any) -> PruningSpec:
        """A method at the rate that takes about that many bytes."""
        known = METHODS[method].settings
        settings |= {name: value for name, value in self.spec.method_settings.items() if name in known}  # of training
        spec = PruningSpec(method, seed=self.spec.seed, method_settings=settings)
        shapes = {name: tuple(self.plan.finetuned[name].shape) for name in self.plan.pruned}
        in_scope, least = sum(map(prod, shapes.values())), least_rate(spec, shapes, self.plan.new_rows)
        few = "int2" if size * 8 / _BITS["int2"] < _MANY * (1 - least) * in_scope else "int4"
        bits = _IMPORTANCE_BITS if method == "importance" else _BITS[few]
        rate = max(1 - max(size, 1.0) * 8 / bits / in_scope, least + _LEAST_RATE)
        if "factors_dtype" in known:
            settings["factors_dtype"] = few
        dtype = few if method == "refit" else spec.dtype
        return replace(spec, pruning_rate=round(rate, 9), dtype=dtype, method_settings=settings)

    def _with_rest(self, size: float) -> PruningSpec:
        """Half of the bytes for factors, half for a sampled rest."""
        factors = self._spec("lowrank", size / 2)
        covered = self.plan.covering(factors)
        of_maps = sum(pair.numel for pair in covered.pairs if len(pair.shape) > 1)
        rest = max(1 - size / 2 * 8 / _BITS["int2"] / max(of_maps, 1), _LEAST_REST)
        if rest >= 1:
            raise ValueError("there is no map to sample a rest of, or no room for one")
        trained = Training.among(factors.method_settings)
        untrained = {name: value for name, value in factors.method_settings.items() if name not in trained}
        return replace(factors, method_settings={**untrained, "rest": round(rest, 9)})

    def _form(self, name: str, make: Callable[[float], PruningSpec], max_bytes: int) -> Form:
        """The largest delta of a form within the bytes, fitted; a smaller one is fitted where it came out larger."""
        limit = max_bytes
        for _ in range(_FITS):
            form = self._fitted(name, *self._drawn(make, limit))
            if form.num_bytes <= max_bytes:
                return form
            limit -= 2 * (form.num_bytes - max_bytes)
        raise ValueError(f"{form.num_bytes:,} bytes once it is fitted")

    def _drawn(self, make: Callable[[float], PruningSpec], max_bytes: int) -> tuple[PruningSpec, SparseDelta]:
        """The largest delta within the bytes, not yet fitted."""
        sizes, found = _Sizes(max_bytes), None
        for _ in range(_TRIES):
            spec = make(sizes.next)
            drawn = self.plan.draw(spec)
            num_bytes = cast(drawn, self.plan.covering(spec).pairs, spec).num_bytes
            if sizes.add(num_bytes):
                found = spec, drawn
            if sizes.done:
                break
        if found is None:
            raise ValueError(f"{num_bytes:,} bytes at pruning_rate={spec.pruning_rate:g}")
        return found

    def _fitted(self, name: str, spec: PruningSpec, drawn: SparseDelta) -> Form:
        pairs, delta = self.plan.covering(spec).pairs, drawn
        if spec.fit is not None:
            delta = Calibrator(pairs, self.objective, spec.dtype, self._telling(name)).fit(drawn).apply(drawn)
        delta = cast(delta, pairs, spec)
        assert self.objective.distillation is not None
        told, loss = delta.info.training.get("form", ""), self.objective.distillation.loss(delta)
        return Form(f"{name} ({told})" if told else name, delta, delta.num_bytes, loss)

    def _telling(self, name: str) -> Report | None:
        report = self.report
        return None if report is None else lambda text: report(f"{name}, {text}")


class _Sizes:
    """The sizes that a form is asked for, until its bytes are at most those wanted and nearly as many.

    Bytes grow with the size, in steps where a rank does: after one delta that fits and one that does not, the next size
    lies between them.

    Args:
        max_bytes: that are wanted.
    """

    def __init__(self, max_bytes: int) -> None:
        self.next, self.done = float(max_bytes), False
        self._max = max_bytes
        self._fits: tuple[float, int] | None = None  # size and bytes
        self._exceeds: tuple[float, int] | None = None

    def add(self, num_bytes: int) -> bool:
        """Take the bytes that the size :attr:`next` came to, and find the one after it; whether it is the best yet."""
        size, before = self.next, self._fits
        if num_bytes > self._max:
            self._exceeds = size, num_bytes
        elif before is None or num_bytes > before[1]:
            self._fits = size, num_bytes
        best = self._fits is not before
        self.next = self._between() if self._fits and self._exceeds else self._beyond(size, num_bytes)
        stuck = self._fits is not None and not best and num_bytes <= self._max  # nothing more to keep
        self.done = stuck or (self._fits is not None and self._fits[1] >= _NEAR * self._max)
        return best

    def _between(self) -> float:
        """By the line through the two, a tenth of their distance away from either."""
        assert self._fits is not None
        assert self._exceeds is not None
        (low, fewer), (high, more) = self._fits, self._exceeds
        share = (_AIM * self._max - fewer) / (more - fewer)
        return low + (high - low) * min(max(share, 0.1), 0.9)

    def _beyond(self, size: float, num_bytes: int) -> float:
        """On from sizes that all fit, or that all exceed: by the ratio of the bytes or their difference."""
        wanted = size * _AIM * self._max / max(num_bytes, 1), size + _AIM * self._max - num_bytes
        return max(wanted) if num_bytes <= self._max else max(min(wanted), size / 4)
