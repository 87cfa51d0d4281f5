"""An experiment: one pair of models, every method, rate and seed pruned, calibrated, scored and saved.

Knows neither Lightning nor data: the caller lends it functions that score the model as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from torch import Tensor

from dpp_lightning.calibration import SearchResult, output_change, q_grid, search_q, search_q_by_score
from dpp_lightning.delta import SparseDelta
from dpp_lightning.delta_file import delta_bytes
from dpp_lightning.methods import get_method
from dpp_lightning.names import TensorSource
from dpp_lightning.plan import PruningPlan


@dataclass(frozen=True)
class Result:
    """One scored model.

    Attributes:
        method: a name of ``METHODS``, or ``base`` / ``fine-tuned``.
        score: the monitored metric on the scored split.
        q, pruning_rate, seed: None for base and fine-tuned.
        num_kept, density, num_bytes, ratio: kept entries, stored over all entries, true bytes of the delta folder's
            files, dense bytes over these; base: 0, fine-tuned: dense.
        seconds: pruning, the search for q where this row made it, scoring and saving.
        forwards: evaluations of the objective that the search of q took, on the row that made it.
        split, q_split: the data of the score and of the search.
        folder: where the delta lies.
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
        outputs: the output layer's tensors on the fixed calibration batch; None if no method needs them.
        reference: the same of the fine-tuned model.
        metric: scores the target on the calibration split; only for the objective ``metric``.
        objective: what q is searched by.
        higher_is_better: direction of the score.
        folder: where deltas are written; None writes none (ranks other than the first).
        dtype: dtype of the kept values in the file; scores are of these very values.
        method_settings: a method's own settings under its name.
        split, q_split: names of the scored data and of the data q is searched on.
        side_files: further files for the deltas' folders, name to bytes.
        card: further figures for the deltas' cards, such as the scores of base and fine-tuned model.
        last: the last delta that was scored.
    """

    plan: PruningPlan
    target: TensorSource
    score: Callable[[], float]
    outputs: Callable[[], list[Tensor]] | None
    reference: list[Tensor]
    metric: Callable[[], float] | None
    objective: Literal["output_change", "metric"]
    higher_is_better: bool
    folder: Path | None
    dtype: str | None = None
    method_settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    split: str = "validation"
    q_split: str = "calibration"
    side_files: dict[str, bytes] = field(default_factory=dict)
    card: dict[str, float] = field(default_factory=dict)
    last: SparseDelta | None = None

    def run(self, methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> Iterator[Result]:
        """Every method, rate and seed (one for a method that draws nothing); q is found once per method and rate, on
        the first seed's mask."""
        for method in methods:
            for rate in rates:
                search: SearchResult | None = None
                for index, seed in enumerate(seeds if get_method(method).random else seeds[:1]):
                    start = time.perf_counter()
                    delta = self.plan.draw(method, rate, seed, self.dtype, self.method_settings.get(method))
                    if get_method(method).searches_q:
                        search = search or self.search(delta)
                        delta = delta.rescaled(search.q)
                    with delta.applied(self.target, force=True):
                        score = self.score()
                    self.last = delta
                    yield self._result(delta, score, start, len(search.tried) if search and index == 0 else 0)

    def search(self, delta: SparseDelta) -> SearchResult:
        """q for one mask, by the chosen objective."""
        rate = delta.pruning_rate
        if self.objective == "metric" and self.metric is not None:
            metric = self.metric

            def labelled(q: float) -> float:
                with delta.rescaled(q).applied(self.target, force=True):
                    return metric()

            return search_q_by_score(labelled, rate, higher_is_better=self.higher_is_better)
        return search_q(lambda q: self._change(delta.rescaled(q)), rate)

    def curve(self, method: str, rate: float, seed: int, points: int, chosen: float | None) -> QCurve:
        """Score and output change over q, both on one mask."""
        delta = self.plan.draw(method, rate, seed, self.dtype, self.method_settings.get(method))
        curve = QCurve(rate, q_grid(rate, points), [], [], chosen)
        for q in curve.q:
            candidate = delta.rescaled(q)
            with candidate.applied(self.target, force=True):
                curve.score.append(self.score())
            curve.change.append(self._change(candidate))
        return curve

    def _change(self, delta: SparseDelta) -> float:
        assert self.outputs is not None
        with delta.applied(self.target, force=True):
            return output_change(self.reference, self.outputs())

    def _result(self, delta: SparseDelta, score: float, start: float, forwards: int) -> Result:
        info = delta.info
        name = f"{info.method}-p{info.pruning_rate:g}-seed{info.seed}"
        if self.folder is None:
            num_bytes = delta.num_bytes
        else:  # the bytes that were written, without encoding them a second time
            saved = delta.save_pretrained(
                self.folder / name, scores={**self.card, "pruned": score}, side_files=self.side_files
            )
            num_bytes = delta_bytes(saved)
        return Result(
            method=info.method,
            score=score,
            pruning_rate=info.pruning_rate,
            seed=info.seed,
            q=delta.q,
            num_kept=delta.num_kept,
            density=delta.density,
            num_bytes=num_bytes,
            ratio=info.dense_bytes / max(num_bytes, 1),
            seconds=time.perf_counter() - start,
            forwards=forwards,
            split=self.split,
            q_split=self.q_split if get_method(info.method).searches_q else "",
            folder=name,
        )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; a single value has deviation 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
