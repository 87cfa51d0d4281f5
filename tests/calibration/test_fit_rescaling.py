"""What methods find on calibration data: closed forms against grids, partitions against the published code, training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import Net, pair

from dpp_lightning import METHODS, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.calibration.calibration_data import Objective
from dpp_lightning.calibration.dpa import (
    amplified,
    partition_rates,
    random_partitions,
    ranked_partitions,
    search_factors,
)
from dpp_lightning.calibration.fit_rescaling import Calibrator, cast
from dpp_lightning.calibration.input_collector import collected_inputs
from dpp_lightning.calibration.layer_q import layer_sums
from dpp_lightning.calibration.output_change import top_logits_error
from dpp_lightning.calibration.output_gradients import BatchGradients
from dpp_lightning.calibration.q_search import search_eta
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.methods.rescaling import layer_q, phi
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.sampling.sampler import kept_positions

FIXTURES = Path(__file__).parents[1] / "fixtures"
IDS = torch.randint(0, 37, (16, 6), generator=torch.Generator().manual_seed(5))


def bound(q, s1, s2, p, eta, gamma=0.95):
    return (eta * (1 - (1 - p) / q) * s1 + eta**2 * phi(p) * s2 / (4 * q**2) + np.log(2 / (1 - gamma))) / eta


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("eta", [0.05, 0.37, 1.01, 8.0])
def test_the_closed_form_is_the_grids_minimum(p, eta):
    rng = np.random.default_rng(0)
    for s1, s2 in zip(rng.exponential(1, 20), rng.exponential(1, 20), strict=True):
        # a float64 grid over 1/q: the bound is quadratic there
        inverse = np.linspace(1.0, 1 / (1 - p), 200_001)
        values = bound(1 / inverse, s1, s2, p, eta)
        best = 1 / inverse[values.argmin()]
        found = layer_q(torch.tensor([s1]).double(), torch.tensor([s2]).double(), p, eta)
        assert bound(found, s1, s2, p, eta) <= values.min() + 1e-9 * abs(values.min())
        assert found == pytest.approx(best, rel=2e-2 if p > 0.99 else 2e-3)


def test_layer_q_over_rows():
    s1, s2 = torch.ones(20).double(), torch.full((20,), 0.02).double()
    s2[0] = 1e6  # an outlier row
    mean, median, trimmed = (layer_q(s1, s2, 0.99, 1.0, rows=rows) for rows in ("mean", "median", "trimmed"))
    assert median == trimmed < mean
    assert layer_q(s1, s2, 0.99, 0.0) == pytest.approx(0.01)
    assert layer_q(torch.zeros(3), torch.zeros(3), 0.9, 1.0) == pytest.approx(0.1)


def test_phi_has_its_limits():
    assert phi(0.5) == 0.5
    assert phi(0.4999) == pytest.approx(0.5, abs=1e-3)
    assert phi(0.99) == pytest.approx(0.98 / np.log(99))


def calibrated(base, finetuned, cost=None):
    """The plan that knows its layers' inputs, a calibrator by the output change, and the module that deltas go onto."""
    with collected_inputs(finetuned) as collector:
        reference = finetuned(IDS).detach()
    plan = PruningPlan.of(base, finetuned, Scope()).with_inputs(collector.statistics)
    target = Net()
    target.load_state_dict(base.state_dict())

    def change(delta):
        with delta.applied(target, force=True), torch.no_grad():
            return float((target(IDS) - reference).abs().mean())

    return plan, Calibrator(plan.pairs, Objective(cost or change)), target


def test_layer_sums_equal_a_dense_twin():
    base, finetuned = pair()
    plan, _, _ = calibrated(base, finetuned)
    sums = layer_sums(plan.pairs)
    for b in range(2):
        for i in (0, 2):
            name = f"layers.{b}.{i}"
            layer, old = finetuned.layers[b][i], base.layers[b][i]
            c = (layer.weight - old.weight).double() * plan.inputs[f"{name}.weight"].mean
            c = torch.cat([c, (layer.bias - old.bias).double().unsqueeze(1)], 1).detach()
            s1, s2 = sums.of_weight[f"{name}.weight"]
            assert torch.allclose(s1, c.sum(1), atol=1e-9)
            assert torch.allclose(s2, c.square().sum(1), atol=1e-12)


def test_darex_q_layer_is_never_worse_than_dare_and_biases_share_their_layers_q():
    base, finetuned = pair(scale=0.3)
    plan, calibrator, _ = calibrated(base, finetuned)
    delta = plan.draw(PruningSpec("darex-q-layer", 0.9, 0))
    fit = calibrator.fit(delta)
    best = fit.apply(delta)
    assert calibrator.cost(best) <= calibrator.cost(delta)
    factor = {n: (best.tensors[n].values / delta.tensors[n].values).unique() for n in delta.tensors}
    weight, bias = factor["layers.0.0.weight"], factor["layers.0.0.bias"]
    assert torch.allclose(weight.mean(), bias.mean(), rtol=1e-5)
    assert all(float(f.max() - f.min()) < 1e-5 for f in factor.values() if len(f))
    assert fit.tried[0][0] == 0.0, "eta = 0 is DARE and is tried first"
    other = plan.draw(PruningSpec("darex-q-layer", 0.9, 1))
    assert fit.apply(other).info.settings["eta"] == best.info.settings["eta"]


def test_dare_dpa_and_dppa_minimise_their_cost():
    base, finetuned = pair(scale=0.3)
    plan, calibrator, _ = calibrated(base, finetuned)
    for method, rate in (("dppa", 0.9), ("dppa", 0.7), ("dare-dpa", 0.7)):
        delta = plan.draw(PruningSpec(method, rate, 0))
        fit = calibrator.fit(delta)
        found = fit.apply(delta)
        assert calibrator.cost(found) <= calibrator.cost(delta) + 1e-9
        assert calibrator.cost(found) == pytest.approx(min(cost for _, cost in fit.tried), rel=1e-5)
        assert found.info.settings["partitions"] == partition_rates(rate)
        if method == "dare-dpa":
            assert all(0 <= f <= 1 for f in found.info.settings["factors"])


def test_amplification_equals_the_published_code():
    r = load_file(FIXTURES / "dppa_reference.safetensors")
    delta, p90, p80 = r["dpa.delta"].flatten(), r["dpa.p90"].flatten(), r["dpa.p80"].flatten()
    kept = p80.nonzero().flatten()
    partition = (p90[kept] == 0).long()  # what p = 0.8 adds is the second
    assert torch.equal(ranked_partitions(delta[kept], [int((p90 != 0).sum()), len(kept)]), partition), (
        "magnitude's partitions are those of the published code"
    )
    out = torch.zeros_like(delta)
    out[kept] = amplified(delta[kept], partition, [1.8, 1.2])
    assert torch.allclose(out, r["dpa.out"].flatten(), rtol=1e-6)


def test_partition_rates():
    assert partition_rates(0.99) == [0.99]
    assert partition_rates(0.9) == [0.9]
    assert partition_rates(0.7) == [0.9, 0.8, 0.7]
    assert partition_rates(0.75) == [0.9, 0.8, 0.75]


def test_random_partitions_are_nested_subsets_at_their_rates():
    positions = torch.from_numpy(kept_positions("w", 100_000, 0.7, 3))
    part = random_partitions("w", positions, 100_000, [0.9, 0.8, 0.7], 3)
    shares = [int((part <= k).sum()) / 100_000 for k in range(3)]
    assert shares == pytest.approx([0.1, 0.2, 0.3], abs=0.005)


def test_both_searches_run_and_the_better_wins():
    seen = []

    def cost(factors):
        seen.append(tuple(factors))
        return abs(factors[0] - 1.3) + abs(factors[1] - 1.1)

    factors, trail = search_factors(cost, 2, 0.1)
    assert factors == pytest.approx([1.3, 1.1])
    assert {(1.0, 0.0), (1.0, 1.0)} <= set(seen)
    assert len(seen) == len(set(seen)) == len(trail), "nothing is tried twice"


@pytest.mark.parametrize("smooth", [True, False])
def test_eta_is_found(smooth):
    result = search_eta(lambda eta: abs(np.log(max(eta, 1e-9) / 0.5)), smooth=smooth)
    assert result.q == pytest.approx(0.5, rel=0.02 if smooth else 0.9)


def test_top_logits_error_equals_the_published_objective():
    r = load_file(FIXTURES / "objective_reference.safetensors")
    value = top_logits_error(r["objective.finetuned"], r["objective.pruned"])
    assert float(value) == pytest.approx(float(r["objective.top5_mse"]), rel=1e-5)


def test_learned_coefficients_lower_the_error_and_have_the_right_gradient():
    base, finetuned = pair(scale=0.3)
    plan, calibrator, target = calibrated(base, finetuned)
    held = {n: t.detach().clone() for n, t in target.state_dict().items()}
    target.load_state_dict(finetuned.state_dict())
    output = BatchGradients(target, {"ids": IDS}, lambda piece: target(piece["ids"]))
    target.load_state_dict(held)
    delta = plan.draw(PruningSpec("darex-learned", 0.9, 0))
    gradients = output.gradients(delta, 0)
    name, step = "layers.0.0.weight", 1e-3
    moved = delta.tensors[name].values.clone()
    moved[0] += step * delta.q  # the entry itself moves by step
    other = plan.draw(PruningSpec("darex-learned", 0.9, 0))
    other.tensors[name].values.copy_(moved)
    slope = (output.loss(other, 0) - output.loss(delta, 0)) / step
    assert slope == pytest.approx(float(gradients[name][0]), rel=0.05, abs=1e-3)
    fit = Calibrator(plan.pairs, Objective(calibrator.cost, gradients=output)).fit(delta)
    assert output.loss(fit.apply(delta), output.batches - 1) <= output.loss(delta, output.batches - 1)
    assert len(fit.tried) > 2
    assert all(torch.equal(t, held[n]) for n, t in target.state_dict().items()), "the target is as before"


def test_weights_are_cast_once_and_survive_the_file(tmp_path):
    base, finetuned = pair(scale=0.3)
    plan, calibrator, _ = calibrated(base, finetuned)
    spec = PruningSpec("darex-q-layer", 0.9, dtype="bfloat16")
    delta = plan.draw(spec)
    assert {t.values.dtype for t in delta.tensors.values()} == {torch.float32}
    done = cast(calibrator.fit(delta).apply(delta), plan.pairs, spec)
    assert {t.values.dtype for t in done.tensors.values()} == {torch.bfloat16}
    done.save_pretrained(tmp_path / "d")
    back = type(done).from_pretrained(tmp_path / "d")
    for n, t in done.tensors.items():
        assert torch.equal(t.values, back.tensors[n].values)
        assert torch.equal(t.indices, back.tensors[n].indices)
    assert back.info.settings == done.info.settings


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("rate", [0.0, 0.9, 0.999])
def test_every_method_prunes_reverts_and_survives_its_file(method, rate, tmp_path):
    base, finetuned = pair(scale=0.3)
    plan, calibrator, target = calibrated(base, finetuned)
    data = Calibration(calibrator.cost, plan.inputs)
    if METHODS[method].fit is not None and METHODS[method].fit.needs_gradients:
        with pytest.raises(ValueError, match="DeltaPruneCallback"):
            prune(base, finetuned, method, 0.9, calibration=data)
        return
    fit = METHODS[method].fit
    if fit is not None and fit.needs_distillation:  # their own tests are in test_distillation.py
        settings = {"max_bytes": 9000} if method == "auto" else {}
        with pytest.raises(ValueError, match=r"trains on batches|compares forms"):
            prune(base, finetuned, method, 0.5, calibration=data, **settings)
        return
    delta = prune(base, finetuned, method, rate, calibration=data)
    if rate == 0:
        with delta.applied(target), torch.no_grad():
            assert torch.allclose(target(IDS), finetuned(IDS), atol=1e-5), "p = 0 keeps everything in every method"
    delta.save_pretrained(tmp_path / "d")
    back = type(delta).from_pretrained(tmp_path / "d")
    with back.applied(target):
        pass
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("method", ["wanda", "darex-q-layer"])
def test_missing_inputs_are_told_with_the_cure(method):
    base, finetuned = pair()
    with pytest.raises(ValueError, match="inputs"):
        prune(base, finetuned, method, 0.9, calibration=Calibration(lambda delta: 0.0))


def test_methods_that_fit_refuse_one_q_and_no_data():
    base, finetuned = pair()
    with pytest.raises(ValueError, match="more than one q"):
        prune(base, finetuned, "dppa", 0.9, q=0.5)
    with pytest.raises(ValueError, match="fits its rescaling"):
        prune(base, finetuned, "dppa", 0.9)
    with pytest.raises(ValueError, match="must be a number"):
        prune(base, finetuned, "owl", 0.9, fluctuation="much")
