"""prune(): works with its own defaults, and says what calibration data a method cannot do without."""

import copy

import pytest
import torch
from tiny import pair
from tiny_glue import bert_config
from transformers import BertForSequenceClassification

from dpp_lightning import METHODS, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope


def test_the_defaults_are_dare_at_nine_tenths():
    base, finetuned = pair()
    delta = prune(base, finetuned)
    assert (delta.info.method, delta.pruning_rate, delta.info.seed) == ("dare", 0.9, 0)
    assert delta.q == 0.1
    for name, kept in delta.tensors.items():
        difference = (finetuned.state_dict()[name] - base.state_dict()[name]).flatten()
        assert torch.equal(kept.values, difference[kept.indices.long()])


def test_a_plain_function_is_no_calibration_data():
    base, finetuned = pair()
    with pytest.raises(TypeError, match=r"Calibration\(function\)"):
        prune(base, finetuned, "darex-q", calibration=lambda delta: 0.0)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.fit and row.fit.required])
def test_calibration_data_without_an_objective_is_not_enough(method):
    """The layers' inputs alone leave a method that fits without anything to go by: an error, not another method."""
    base, finetuned = pair()
    statistics = {}
    with pytest.raises(ValueError, match="calibration"):
        prune(base, finetuned, method, 0.9, calibration=Calibration(inputs=statistics))


def test_importance_without_an_objective_keeps_its_own_q():
    base, finetuned = pair()
    assert prune(base, finetuned, "importance", 0.9, calibration=Calibration()).q == pytest.approx(0.1)


def test_what_is_found_on_one_mask_serves_the_next_without_another_search():
    base, finetuned = pair()
    plan, calls = PruningPlan.of(base, finetuned, Scope()), []
    calibration = Calibration(lambda delta: calls.append(delta.q) or (delta.q - 0.3) ** 2)
    first, found = plan.draw_and_fit(PruningSpec("darex-q", 0.9, seed=0), calibration)
    searched = len(calls)
    second, again = plan.draw_and_fit(PruningSpec("darex-q", 0.9, seed=1), calibration, found)
    assert searched == len(found.tried) > 1
    assert len(calls) == searched
    assert again is found
    assert first.q == second.q == pytest.approx(0.3, rel=0.02)
    name = "layers.0.0.weight"
    assert not torch.equal(first.tensors[name].indices, second.tensors[name].indices)


class Weighted(torch.nn.Module):
    """A classifier of transformers with a loss that has class weights, as in many LightningModules."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))


def test_constants_beside_a_transformers_model_are_no_part_of_its_delta(tmp_path):
    model = BertForSequenceClassification(bert_config(num_labels=3))
    model.save_pretrained(tmp_path / "base")
    base, finetuned = Weighted(model), copy.deepcopy(Weighted(model))
    with torch.no_grad():
        finetuned.model.classifier.weight.add_(1)
    prune(base, finetuned, pruning_rate=0).save_pretrained(tmp_path / "delta")
    apply_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense").state_dict()
    assert dense.keys() == finetuned.model.state_dict().keys()
    assert all(torch.equal(dense[name], value) for name, value in finetuned.model.state_dict().items())
    finetuned.loss.weight.mul_(2)  # one that changed is stored whole
    changed = prune(base, finetuned, pruning_rate=0)
    assert torch.equal(changed.carried["loss.weight"], finetuned.loss.weight)
