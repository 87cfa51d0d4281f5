"""The bounds of Theorem 3.1 as guarantees or as a scaling, layer statistics against slow twins, the choice of Fig. 4."""

from math import log, sqrt

import numpy as np
import pytest
import torch
from torch import nn

from dpp_lightning.analysis import theory
from dpp_lightning.analysis.layer_statistics import layer_statistics, mean_magnitude, outlier_features
from dpp_lightning.analysis.theory import berend_kontorovich, bound, hoeffding, kearns_saul, recommend
from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.methods import tensor_pair
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.methods.tensor_pair import TensorPair

RATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)


# --- factors --------------------------------------------------------------------------------------------------------


def test_factors_are_those_of_figure_10():
    assert hoeffding(0.9) == pytest.approx(10 / sqrt(2))
    assert kearns_saul(0.9) == pytest.approx(sqrt(0.8 / log(9)) / 0.1)
    assert berend_kontorovich(0.9) == pytest.approx(sqrt(18))
    for factor in (hoeffding, kearns_saul, berend_kontorovich):
        assert factor(0.5) == pytest.approx(sqrt(2))
        assert factor(0.5 + 1e-9) == pytest.approx(sqrt(2), rel=1e-6)
    assert kearns_saul(0.0) == 0.0
    assert kearns_saul(1e-12) < 0.3
    assert hoeffding(0.0) == pytest.approx(1 / sqrt(2))


def test_each_factor_improves_on_the_one_before():
    for rate in np.linspace(0.001, 0.999, 99):
        assert kearns_saul(rate) <= hoeffding(rate) * (1 + 1e-12)
        if rate >= 0.5:
            assert berend_kontorovich(rate) <= kearns_saul(rate) * (1 + 1e-12)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), "x"])
def test_a_rate_outside_is_refused(rate):
    for factor in (hoeffding, kearns_saul, berend_kontorovich):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            factor(rate)


def test_berend_and_kontorovich_begin_at_a_half():
    with pytest.raises(ValueError, match=r"\[0\.5, 1\).*kearns_saul"):
        berend_kontorovich(0.49)


# --- the bound ------------------------------------------------------------------------------------------------------


def violations(c: np.ndarray, rate: float, draws: int, factor, gamma: float) -> float:
    """How often random drop with rescaling moves the output sum_j c_j by more than the bound."""
    kept = np.random.default_rng(7).random((draws, len(c)), dtype=np.float32) >= rate
    change = c.sum() - kept @ c / (1 - rate)
    limit = bound(rate, float(c.mean()), float(c.var()), len(c), gamma, factor)
    return float((np.abs(change) > limit).mean())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_hoeffding_and_kearns_saul_are_guarantees(rate, gamma):
    generator, draws = np.random.default_rng(0), 10_000
    slack = 4 * sqrt(gamma * (1 - gamma) / draws)
    for c in (generator.normal(size=64), generator.exponential(size=64), np.ones(64), np.eye(64)[0]):
        for factor in (hoeffding, kearns_saul):
            assert violations(c, rate, draws, factor, gamma) <= 1 - gamma + slack


def test_berend_and_kontorovich_is_a_scaling_only():
    """At p = 0.999 one kept entry of 64 is rare (6.2 %) and moves the output by more than the 'bound'."""
    share = violations(np.ones(64), 0.999, 100_000, berend_kontorovich, 0.95)
    assert share == pytest.approx(1 - 0.999**64, abs=0.004)
    assert share > 0.05
    wide = np.random.default_rng(0).normal(size=4096)
    assert violations(wide, 0.9, 4000, berend_kontorovich, 0.95) <= 0.05  # where n (1 - p) is large it holds


def test_the_bound_is_that_of_the_norm():
    c = np.random.default_rng(1).normal(0.3, 2, 50)
    expected = hoeffding(0.9) * sqrt(log(2 / 0.05)) * np.linalg.norm(c)
    assert bound(0.9, float(c.mean()), float(c.var()), 50, 0.95, hoeffding) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, float("nan"), 1.0, 5), "finite mean"),
        ((0.9, 0.0, -1.0, 5), "variance >= 0"),
        ((0.9, 0.0, 1.0, -5), "features >= 0"),
        ((0.9, 0.0, 1.0, 5, 1.0), "inside"),
        ((0.9, 0.0, 1.0, 5, 0.0), "inside"),
        ((1.0, 0.0, 1.0, 5), r"\[0, 1\)"),
    ],
)
def test_the_bound_refuses_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        bound(*arguments)


# --- layer statistics -----------------------------------------------------------------------------------------------


def inputs_of(x: torch.Tensor, axis: int = 1) -> InputStatistics:
    x = x.double()
    return InputStatistics(x.sum(0), x.square().sum(0), len(x), axis, largest=x.abs().amax(0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("block", [1 << 19, 100])
def test_statistics_are_those_of_a_dense_twin(axis, block, monkeypatch):
    monkeypatch.setattr(tensor_pair, "BLOCK", block)
    torch.manual_seed(0)
    base, x = torch.randn(33, 21), torch.randn(50, (33, 21)[axis]) + 0.5
    tuned = base + 0.01 * torch.randn_like(base)
    statistics = layer_statistics(TensorPair.of("w", base, tuned, inputs_of(x, axis)))
    delta = (tuned - base).double().numpy()
    assert statistics.shape == (33, 21)
    assert statistics.numel == 33 * 21
    assert statistics.magnitude == pytest.approx(np.abs(delta).mean())
    assert statistics.largest == pytest.approx(np.abs(delta).max())
    rows = delta if axis == 1 else delta.T  # one row an output
    c = np.array([[d * m for d, m in zip(row, x.double().mean(0).tolist(), strict=True)] for row in rows])
    influence = statistics.influence
    assert influence.features == c.shape[1]
    assert influence.magnitude == pytest.approx(np.abs(c).mean(), rel=1e-5)
    assert influence.mean == pytest.approx(np.mean([abs(row.mean()) for row in c]), rel=1e-5)
    assert influence.variance == pytest.approx(np.mean([row.var() for row in c]), rel=1e-5)
    limits = [bound(0.99, row.mean(), row.var(), len(row)) for row in c]
    assert influence.bound(0.99) == pytest.approx((np.mean(limits), np.median(limits)), rel=1e-5)


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (3, 0), (2, 3, 4)])
def test_tensors_of_any_rank(shape, monkeypatch):
    monkeypatch.setattr(tensor_pair, "BLOCK", 5)
    delta = torch.linspace(-1, 2, int(torch.Size(shape).numel())).reshape(shape)
    statistics = layer_statistics(TensorPair.of("w", torch.zeros(shape), delta))
    assert statistics.influence is None
    assert statistics.total == pytest.approx(float(delta.abs().sum()))
    assert statistics.largest == (float(delta.abs().max()) if delta.numel() else 0.0)


def test_the_mean_of_the_model_weighs_entries():
    pairs = [
        TensorPair.of("a", torch.zeros(30), torch.ones(30)),
        TensorPair.of("b", torch.zeros(10), 5 * torch.ones(10)),
    ]
    assert mean_magnitude([layer_statistics(pair) for pair in pairs]) == pytest.approx(2.0)
    assert mean_magnitude([]) == 0.0


def test_embeddings_have_no_influence_and_wrong_inputs_are_refused():
    pair = torch.zeros(5, 3), torch.ones(5, 3)
    embedding = InputStatistics(torch.ones(5).double(), torch.ones(5).double(), 5, 0, embedding=True)
    assert layer_statistics(TensorPair.of("e", *pair, embedding)).influence is None
    with pytest.raises(ValueError, match=r"4 features along dimension 1.*\(5, 3\)"):
        layer_statistics(TensorPair.of("w", *pair, inputs_of(torch.ones(2, 4))))
    with pytest.raises(ValueError, match="not finite"):
        layer_statistics(TensorPair.of("w", pair[0], torch.full((5, 3), torch.inf)))


# --- outliers -------------------------------------------------------------------------------------------------------


def test_outlier_features_and_massive_activations():
    torch.manual_seed(0)
    x = torch.randn(500, 40)
    assert outlier_features(inputs_of(x)) == ((), ())
    x[:, 3] *= 10  # large on every token
    x[0, 8] = 3000.0  # massive on one token: its root mean square is large too
    x[0, 9] = 90.0  # large, but not massive, on one token
    outliers, massive = outlier_features(inputs_of(x))
    assert (outliers, massive) == ((3, 8), (8,))
    assert outlier_features(inputs_of(torch.zeros(5, 4))) == ((), ())
    dead = torch.cat([torch.zeros(500, 60), torch.randn(500, 4)], 1)  # as behind a ReLU
    assert outlier_features(inputs_of(dead)) == ((), ())


def test_hooks_keep_the_largest_input_of_all_calls():
    layer, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 10, 6)
    with collected_inputs(layer) as collector:
        for batch in x:
            layer(batch)
    statistics = collector.statistics["weight"]
    assert torch.equal(statistics.largest, x.reshape(-1, 6).abs().amax(0).double())


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean_delta", "situation", "method", "objective", "optimizer"),
    [
        (7e-4, {"labels": True}, "darex-q", "metric", None),
        (7e-4, {}, "darex-q", "output change", None),
        (7e-4, {"inputs": False}, "darex-q", "output change", None),
        (0.017, {}, "wanda", None, None),
        (0.017, {"inputs": False}, "magnitude", None, None),
        (0.017, {"labels": True}, "dppa", None, None),
        (0.017, {"can_retrain": True}, "darex-q", "output change", "AdamR-L2"),
        (7e-4, {"can_retrain": True, "labels": True}, "darex-q", "metric", "AdamR-L2"),
    ],
)
def test_the_choice_follows_figure_4(mean_delta, situation, method, objective, optimizer):
    advice = recommend(mean_delta, **situation)
    assert (advice.method, advice.objective, advice.optimizer) == (method, objective, optimizer)
    assert f"{mean_delta:.2g}" in advice.reason
    assert advice.method in METHODS


@pytest.mark.parametrize("mean_delta", [-1.0, float("nan"), float("inf")])
def test_the_choice_refuses_a_mean_that_cannot_be(mean_delta):
    with pytest.raises(ValueError, match=r"mean \|delta\|"):
        recommend(mean_delta)


def test_a_delta_is_large_from_the_threshold_on():
    assert recommend(theory.LARGE_DELTA).method == "wanda"
    assert "at least 0.01" in recommend(theory.LARGE_DELTA).reason
