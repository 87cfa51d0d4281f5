"""An experiment: one pair of models, every method, rate and seed pruned, calibrated, scored and saved.

Knows neither Lightning nor data: the caller lends it functions that score the model as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from dpp_lightning.calibration.calibration_data import Calibration, OutputGradients
from dpp_lightning.calibration.distillation import Distillation
from dpp_lightning.calibration.fit_rescaling import FoundRescaling, Report, cast
from dpp_lightning.calibration.q_search import q_grid
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.delta.sparse_delta import SparseDelta
from dpp_lightning.experiments.row_groups import Row, RowGroup, rate_text
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.tensors.names import TensorSource


@dataclass(frozen=True)
class Result:
    """One scored model.

    Attributes:
        method: a name of ``METHODS``, or ``base`` / ``fine-tuned``.
        score: the monitored metric on the scored split.
        q, pruning_rate, seed: None for base and fine-tuned.
        num_kept, density, num_bytes, ratio: kept entries and numbers of factors, stored over all entries, true bytes of
            the delta folder's files, dense bytes over these; base: 0, fine-tuned: dense.
        seconds: pruning, scoring and saving.
        forwards: evaluations of the objective that the search of q took, on the row that made it.
        split, q_split: the data of the score and of the search.
        folder: where the delta lies.
        prune_seconds: of the seconds, drawing, and the search for q or the training where this row made it.
        score_seconds: of the seconds, the pass over the scored split.
    """

    method: str
    score: float
    pruning_rate: float | None = None
    seed: int | None = None
    q: float | None = None
    num_kept: int = 0
    density: float = 0.0
    num_bytes: int = 0
    ratio: float | None = None
    seconds: float = 0.0
    forwards: int = 0
    split: str = ""
    q_split: str = ""
    folder: str | None = None
    prune_seconds: float = 0.0
    score_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for one line of ``results.jsonl``."""
        return asdict(self)


@dataclass(frozen=True)
class QCurve:
    """Score and output change over q at one rate (Fig. 1): lists of equal length."""

    pruning_rate: float
    q: list[float]
    score: list[float]
    change: list[float]
    chosen: float | None = None


@dataclass
class Experiment:
    """The grid of methods, rates and seeds on one pair of models.

    Attributes:
        plan: base and fine-tuned weights.
        target: holds the base's weights; every delta is applied to it, scored, and reverted.
        score: scores the target as it stands (the monitored metric on the scored split).
        change: of the outputs on the fixed calibration batch, of the target as it stands against the fine-tuned model;
            None if no method needs it.
        metric: scores the target on the calibration split; only for the objective ``metric``.
        gradients: of the output's error on the calibration batch; only for ``darex-learned``.
        distillation: trains toward the fine-tuned model's outputs; only for methods that train.
        begins: called with every row before it is made.
        stage: called with what is tried for the row in progress.
        objective: what q is searched by.
        higher_is_better: direction of the score.
        folder: where deltas are written; None writes none (ranks other than the first).
        dtype: dtype of the kept values in the file; scores are of these very values.
        method_settings: a method's own settings under its name.
        split, q_split: names of the scored data and of the data q is searched on.
        side_files: further files for the deltas' folders, name to bytes.
        monitor: name of the score, for the deltas' cards.
        reference_scores: further figures for the cards, such as the scores of base and fine-tuned model.
        last: the last delta that was scored.
    """

    plan: PruningPlan
    target: TensorSource
    score: Callable[[], float]
    change: Callable[[], float] | None
    metric: Callable[[], float] | None
    objective: Literal["output_change", "metric"]
    higher_is_better: bool
    folder: Path | None
    dtype: str | None = None
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    split: str = "validation"
    q_split: str = "calibration"
    side_files: dict[str, bytes] = field(default_factory=dict)
    monitor: str = "score"
    reference_scores: dict[str, float] = field(default_factory=dict)
    gradients: OutputGradients | None = None
    distillation: Distillation | None = None
    begins: Callable[[Row], None] | None = None
    stage: Report | None = None
    last: SparseDelta | None = None

    def run(self, group: RowGroup, done: Collection[Row] = ()) -> Iterator[Result]:
        """The rows of a group, but for those that are made already.

        What their method fits is found once, on the mask of the group's first row, made already or not.
        """
        rescaling: FoundRescaling | None = None
        for row in group.rows:
            if row in done:
                continue
            if self.begins is not None:
                self.begins(row)
            start, known, spec = time.perf_counter(), rescaling, self._spec(*row)
            if rescaling is None and spec.fit is not None and row != group.rows[0]:
                first = self._spec(*group.rows[0])
                rescaling = self.plan.draw_and_fit(first, self.calibration, report=self.stage)[1]
            delta, rescaling = self.plan.draw_and_fit(spec, self.calibration, rescaling, report=self.stage)
            pruned = time.perf_counter()
            with delta.applied(self.target, force=True):
                score = self.score()
            scored = time.perf_counter()
            self.last = delta
            forwards = len(rescaling.tried) if rescaling is not None and known is None else 0
            result = self._result(spec, delta, score, forwards)
            yield replace(
                result,
                seconds=time.perf_counter() - start, prune_seconds=pruned - start, score_seconds=scored - pruned,
            )  # fmt: skip

    @property
    def calibration(self) -> Calibration:
        """What fits go by: the chosen objective on the calibration data."""
        return Calibration(self._cost, smooth=self._smooth, gradients=self.gradients, distillation=self.distillation)

    def _spec(self, method: str, rate: float, seed: int) -> PruningSpec:
        settings = self.method_settings.get(method, {})
        return PruningSpec(method, rate, seed, self.dtype, method_settings=settings)

    @property
    def _smooth(self) -> bool:
        return self.objective != "metric" or self.metric is None

    def _cost(self, delta: SparseDelta) -> float:
        """The number to be minimised: the output change, or the metric on the calibration split, turned."""
        if self._smooth:
            return self._change(delta)
        assert self.metric is not None
        with delta.applied(self.target, force=True):
            score = self.metric()
        return -score if self.higher_is_better else score

    def curve(self, method: str, rate: float, seed: int, points: int, chosen: float | None) -> QCurve:
        """Score and output change over q, both on one mask."""
        spec = self._spec(method, rate, seed)
        delta = cast(self.plan.draw(spec), self.plan.pairs, spec)
        curve = QCurve(rate, q_grid(rate, points), [], [], chosen)
        for q in curve.q:
            candidate = delta.rescaled(q)
            with candidate.applied(self.target, force=True):
                curve.score.append(self.score())
            curve.change.append(self._change(candidate))
        return curve

    def _change(self, delta: SparseDelta) -> float:
        assert self.change is not None
        with delta.applied(self.target, force=True):
            return self.change()

    def _result(self, spec: PruningSpec, delta: SparseDelta, score: float, forwards: int) -> Result:
        info, row = delta.info, spec.row
        name = delta_name(spec.method, spec.pruning_rate, spec.seed)
        if self.folder is None:
            num_bytes = delta.num_bytes
        else:  # the bytes that were written, without encoding them a second time
            saved = delta.save_pretrained(
                self.folder / name,
                scores={self.monitor: score},
                reference_scores=self.reference_scores,
                side_files=self.side_files,
            )
            num_bytes = delta_bytes(saved)
        return Result(
            method=spec.method,
            score=score,
            pruning_rate=spec.pruning_rate,
            seed=spec.seed,
            q=delta.q,
            num_kept=delta.num_kept + delta.num_factor_numbers,
            density=delta.density,
            num_bytes=num_bytes,
            ratio=info.ratio(num_bytes),
            forwards=forwards,
            split=self.split,
            q_split=self.q_split if row.fit or row.needs_inputs(spec.method_settings) else "",
            folder=name,
        )


def delta_name(method: str, pruning_rate: float, seed: int) -> str:
    """Name of the folder that a delta of an experiment is saved in, such as ``dare-p0.9-seed0``."""
    return f"{method}-p{rate_text(pruning_rate)}-seed{seed}"


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; a single value has deviation 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
