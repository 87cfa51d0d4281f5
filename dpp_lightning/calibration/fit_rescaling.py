"""Fitting: what a method finds on calibration data once its entries are chosen, as weights of the kept values and q."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from torch import Tensor

from dpp_lightning.calibration.calibration_data import Objective
from dpp_lightning.calibration.distillation import Distillation
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.registry import get_method
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.tensors.dtypes import to_dtype

Report = Callable[[str], object]


@dataclass(frozen=True)
class FoundRescaling:
    """What was found on one mask; it serves every mask of the same method and rate.

    Attributes:
        apply: gives a delta its weights and q.
        tried: every candidate with its objective.
    """

    apply: Callable[[SparseDelta], SparseDelta]
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibrator:
    """What a fit is given: the pruned tensors and the objective on calibration data.

    Attributes:
        pairs: the pruned tensors in both models, with the inputs of the layers where the method needs them.
        objective: what the fit goes by.
        dtype: how the file will hold the kept values, for fits that round while they train; None as they are.
        report: called with what is tried, such as ``candidate 7``; None where nobody asks.
    """

    pairs: Sequence[TensorPair]
    objective: Objective
    dtype: str | None = None
    report: Report | None = None
    _candidates: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def distillation(self) -> Distillation:
        """What trains, which the objective of a fit that needs it has (:meth:`fit` refuses others)."""
        assert self.objective.distillation is not None
        return self.objective.distillation

    def cost(self, delta: SparseDelta) -> float:
        """The number to be minimised, of one candidate."""
        self.tell(f"candidate {next(self._candidates)}")
        return self.objective.cost(delta)

    def tell(self, text: str) -> None:
        """Report what is tried now."""
        if self.report is not None:
            self.report(text)

    def tell_step(self, step: int, steps: int, loss: float) -> None:
        """Report a step of training, as :class:`dpp_lightning.calibration.distillation.Distillation` gives it."""
        self.tell(f"step {step} of {steps}, loss {loss:.3f}")

    def fit(self, delta: SparseDelta) -> FoundRescaling:
        """Find what the delta's method fits.

        Args:
            delta: a mask of the method, drawn in :attr:`dpp_lightning.methods.pruning_spec.PruningSpec.drawn_dtype`.

        Raises:
            ValueError: the method has nothing to fit, or needs inputs or gradients that this calibrator has not.
        """
        method, fit = delta.info.method, get_method(delta.info.method).fit
        if fit is None:
            raise ValueError(f"{method} has nothing to fit on calibration data")
        if fit.needs_inputs and not any(pair.inputs is not None for pair in self.pairs):
            raise ValueError(f"{method} needs the layers' inputs on calibration data, and there is none")
        if fit.needs_gradients and self.objective.gradients is None:
            raise ValueError(
                f"{method} trains on calibration batches: use DeltaPruneCallback, dpp sweep, or dpp prune --calibration"
            )
        if fit.needs_distillation and self.objective.distillation is None:
            raise ValueError(
                f"{method} trains on batches of calibration data: use DeltaPruneCallback, dpp sweep, dpp prune "
                "--calibration, or Calibration(distillation=...)"
            )
        rescaling: FoundRescaling = fit.function(self, delta)
        return rescaling


def cast(delta: SparseDelta, pairs: Iterable[TensorPair], spec: PruningSpec) -> SparseDelta:
    """A delta drawn in :attr:`PruningSpec.drawn_dtype` with its values as the file holds them.

    Args:
        delta: drawn by the spec, and given its weights.
        pairs: the pruned tensors in both models.
        spec: has the dtype of the file.

    Raises:
        ValueError: values that are not finite in that dtype.
    """
    if spec.streams:
        return delta
    tensors = held_tensors(delta, pairs, spec.dtype, spec.factors_dtype)
    return delta.with_changes(tensors, dtype=spec.dtype, factors_dtype=spec.factors_dtype)


def held_tensors(
    delta: SparseDelta, pairs: Iterable[TensorPair], dtype: str | None, factors_dtype: str | None
) -> dict[str, SparseTensor]:
    """The tensors of a delta with kept values and factors as a file of these dtypes holds them.

    Args:
        delta: drawn in float32.
        pairs: the pruned tensors in both models.
        dtype, factors_dtype: as of ``DeltaInfo``.

    Raises:
        ValueError: values that are not finite in these dtypes.
    """
    like = {pair.name: pair.finetuned for pair in pairs}
    return {
        name: replace(
            kept,
            values=to_dtype(kept.values, dtype, like[name], name),
            factors=kept.factors and kept.factors.rounded(factors_dtype, name),
        )
        for name, kept in delta.tensors.items()
    }


def weighted(delta: SparseDelta, weights: Mapping[str, float | Tensor], **found_settings: Any) -> SparseDelta:
    """The same entries with their float32 values times one weight a tensor or an entry.

    Args:
        delta: the delta.
        weights: canonical name to a number, or to a tensor of shape (kept,).
        found_settings: what was found, kept in the delta's settings.
    """
    tensors = {name: replace(kept, values=kept.values * weights[name]) for name, kept in delta.tensors.items()}
    return delta.with_changes(tensors, settings={**delta.info.settings, **found_settings})
