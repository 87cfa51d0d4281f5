"""The search for q, output change and the output hook."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dpp_lightning.calibration.output_change import (
    OutputChange,
    output_change,
    recorded_outputs,
    resolve_layer,
    top_logits_error,
)
from dpp_lightning.calibration.q_search import MAX_FORWARDS, q_grid, search_q, search_q_by_score


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("best", [1.0, 1.7, 5.0, 30.0])
def test_search_finds_the_minimum_of_a_convex_objective(rate, best):
    target = min(best * (1 - rate), 1.0)
    calls = []

    def objective(q):
        calls.append(q)
        return abs(1 / q - 1 / target) + 0.1 * abs(q - target)

    result = search_q(objective, rate)
    assert result.q == pytest.approx(target, rel=0.03)
    assert len(calls) <= MAX_FORWARDS - 1  # one forward is left for the reference
    assert calls[0] == pytest.approx(1 - rate, rel=1e-12)
    assert all((1 - rate) * (1 - 1e-9) <= q <= 1 for q in calls)


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("deviation", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("saturation", [0.0, 1.5])
def test_of_a_bias_and_a_deviation_few_candidates_find_the_lowest_sum(rate, deviation, saturation):
    def objective(q):
        r = (1 - rate) / q
        cost = math.hypot(1 - r, deviation * r)
        return math.tanh(saturation * cost) if saturation else cost

    r = max(1 / (1 + deviation**2), 1 - rate)  # where the derivative of (1 - r)^2 + (deviation r)^2 is 0
    result = search_q(objective, rate)
    assert objective(result.q) <= objective((1 - rate) / r) * 1.002
    assert len(result.tried) <= 8


def test_where_the_cost_is_flat_the_lower_of_two_lows_is_found():
    # the change of a hidden layer, measured at rate 0.999: lowest where nearly nothing of the delta is left
    shares = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1, 0.03]
    costs = [0.5103, 0.5146, 0.5335, 0.5593, 0.5559, 0.5013, 0.4213, 0.3549, 0.3366, 0.3358]
    result = search_q(lambda q: float(np.interp(0.001 / q, shares[::-1], costs[::-1])), 0.999)
    assert min(cost for _, cost in result.tried) < 0.34


def test_what_is_not_finite_near_dares_q_is_left_for_what_is():
    result = search_q(lambda q: float("inf") if q < 0.03 else abs(0.01 / q - 0.25), 0.99)
    assert result.q == pytest.approx(0.04, rel=0.05)
    assert math.isinf(result.tried[0][1])
    assert search_q(lambda q: float("nan"), 0.99).q == pytest.approx(0.01)


def test_dares_q_wins_where_it_is_the_best_and_nan_never_does():
    assert search_q(lambda q: q, 0.99).q == pytest.approx(0.01, rel=1e-12)
    assert search_q(lambda q: float("nan") if q < 0.5 else q, 0.9).q >= 0.5


def test_rate_zero_has_one_candidate():
    assert search_q(lambda q: 1.0, 0).tried == ((1.0, 1.0),)
    assert search_q_by_score(lambda q: 1.0, 0, higher_is_better=True).q == 1.0


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_search_by_score_takes_steps_and_breaks_ties_toward_dare(higher_is_better):
    sign = 1 if higher_is_better else -1
    result = search_q_by_score(
        lambda q: sign * (1.0 if 0.02 <= q <= 0.06 else 0.5), 0.99, higher_is_better=higher_is_better
    )
    assert 0.02 <= result.q <= 0.06
    assert len(result.tried) <= 11
    assert search_q_by_score(lambda q: 0.7, 0.99, higher_is_better=higher_is_better).q == pytest.approx(0.01)


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("best", [1.0, 1.8, 2.5, 4.0, 7.0])
def test_search_by_score_comes_close_to_a_best_q_near_dares(rate, best):
    target = min(best * (1 - rate), 1.0)
    found = search_q_by_score(lambda q: -abs(math.log(q / target)), rate, higher_is_better=True).q
    assert target / 1.3 <= found <= target * 1.3


def test_grid_ends_are_exact():
    grid = q_grid(0.99, 12)
    assert grid[0] == pytest.approx(0.01, rel=1e-15)
    assert grid[-1] == 1.0
    assert len(grid) == 12
    assert grid == sorted(grid)


def test_output_change_equals_the_published_objective():
    from safetensors.torch import load_file

    folder = Path(__file__).parents[1] / "fixtures"
    vectors = load_file(folder / "objective_reference.safetensors")
    change = output_change([vectors["objective.finetuned"]], [vectors["objective.pruned"]])
    assert change == pytest.approx(float(vectors["objective.mean_abs"]), rel=1e-5)


def test_output_change_refuses_other_shapes():
    with pytest.raises(ValueError, match="cannot be compared"):
        output_change([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="cannot be compared"):
        output_change([], [])


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.wrap = Tuple()

    def forward(self, x):
        return self.wrap(self.body(x))["x"]


class Tuple(nn.Module):
    def forward(self, x):
        return {"ids": torch.ones(1, dtype=torch.long), "x": x}


def test_outputs_of_tensors_and_mappings_are_recorded():
    module = Structured()
    for layer in (None, "body", "wrap"):
        with recorded_outputs(module, layer) as outputs:
            expected = module(torch.ones(1, 2))
        assert len(outputs) == 1
        assert torch.equal(outputs[0], expected)
    module(torch.ones(1, 2))
    assert len(outputs) == 1  # the hook is gone
    with pytest.raises(ValueError, match="no submodule"):
        resolve_layer(module, "boddy")


@pytest.mark.parametrize("measure", ["mean", "top-logits"])
def test_the_change_of_the_outputs_is_that_of_the_whole_tensors(measure):
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(4, 3, 9, generator=generator), torch.randn(2, 9, generator=generator)]
    after = [t + 0.1 * torch.randn(t.shape, generator=generator) for t in before]
    held, kept = [before], []

    def run(reduce):
        kept.append([reduce(i, output) for i, output in enumerate(held[0])])
        return kept[-1]

    change = OutputChange(run, measure)
    change.take_reference()
    assert change() == 0.0
    held[0] = after
    if measure == "mean":
        assert change() == pytest.approx(output_change(before, after))
        return
    errors = [top_logits_error(a, b) for a, b in zip(before, after, strict=True)]
    assert change() == pytest.approx(float((12 * errors[0] + 2 * errors[1]) / 14))
    assert {t.shape[-1] for outputs in kept for t in outputs} == {5}


def test_fewer_classes_than_five_are_all_compared():
    outputs = [torch.tensor([[1.0, 2.0, 4.0]])]
    change = OutputChange(lambda reduce: [reduce(i, t) for i, t in enumerate(outputs)], "top-logits")
    change.take_reference()
    outputs[0] = torch.tensor([[1.0, 2.0, 1.0]])
    assert change() == pytest.approx(3.0)
