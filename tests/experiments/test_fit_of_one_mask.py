"""What a method finds serves the other seeds, unless it belongs to one mask."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from dpp_lightning.experiments.grid import Experiment, Result
from dpp_lightning.experiments.row_groups import row_groups


class Plan:
    """Notes with what each seed is fitted: what was found before, or None where it is fitted anew."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}

    def draw_and_fit(self, spec: Any, calibration: Any, known: Any = None, *, report: Any = None) -> tuple[Any, Any]:
        self.known[spec.seed] = known
        delta = SimpleNamespace(applied=lambda target, force: nullcontext())
        return delta, known or SimpleNamespace(tried=[0.0] * 3)


def run(method: str, monkeypatch: pytest.MonkeyPatch, done: tuple = ()) -> tuple[Plan, list[int]]:
    def result(self: Experiment, spec: Any, delta: Any, score: float, forwards: int) -> Result:
        return Result(spec.method, score, forwards=forwards)

    monkeypatch.setattr(Experiment, "_result", result)
    plan = Plan()
    experiment = Experiment(plan, {}, lambda: 0.0, lambda: 0.0, None, "output_change", True, None)  # type: ignore[arg-type]
    groups = row_groups([method], [0.9], [0, 1, 2])
    return plan, [made.forwards for group in groups for made in experiment.run(group, done)]


def test_q_of_the_first_seed_serves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, forwards = run("darex-q", monkeypatch)
    assert plan.known[0] is None
    assert plan.known[1] is plan.known[2] is not None
    assert forwards == [3, 0, 0]


def test_trained_values_are_trained_for_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, forwards = run("refit", monkeypatch)
    assert plan.known == {0: None, 1: None, 2: None}
    assert forwards == [3, 3, 3]


def test_a_resumed_run_trains_only_the_seeds_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = run("refit", monkeypatch, done=(("refit", 0.9, 0),))
    assert plan.known == {1: None, 2: None}
