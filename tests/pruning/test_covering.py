"""Methods that hold some of the tensors: the rate is still of all, the others are the base's."""

import pytest
import torch
from tiny import pair
from torch import nn

from dpp_lightning import METHODS, prune
from dpp_lightning.methods import PruningSpec
from dpp_lightning.pruning.plan import PruningPlan
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.sampling.sampler import kept_positions_of

MAPS = {"layers.0.0.weight", "layers.0.2.weight", "layers.1.0.weight", "layers.1.2.weight", "head.weight"}


def plan_of(scope=None):
    base, finetuned = pair()
    return PruningPlan.of(base, finetuned, scope or Scope())


def test_refit_gives_the_whole_budget_to_the_maps():
    plan = plan_of()
    spec = PruningSpec("refit", 0.8)
    delta = plan.draw(spec)
    entries = sum(plan.finetuned[name].numel() for name in plan.pruned)
    covered = sum(plan.finetuned[name].numel() for name in delta.tensors)
    assert {name for name in delta.tensors if plan.finetuned[name].numel()} == MAPS
    assert set(delta.info.reverted) == {name for name in plan.pruned if name not in delta.tensors}
    assert delta.pruning_rate == 0.8
    assert delta.info.drawn_rate == pytest.approx(1 - 0.2 * entries / covered)
    expected = kept_positions_of(
        [(name, plan.finetuned[name].numel()) for name in delta.tensors], delta.info.drawn_rate, 0
    )
    for (name, tensor), positions in zip(delta.tensors.items(), expected, strict=True):
        assert tensor.indices.tolist() == positions.tolist(), name
    assert abs(delta.num_kept - 0.2 * entries) < 5 * (0.2 * entries) ** 0.5


def test_refit_everywhere_draws_as_dare():
    plan = plan_of()
    everywhere = plan.draw(PruningSpec("refit", 0.8, method_settings={"where": "all"}))
    dare = plan.draw(PruningSpec("dare", 0.8))
    assert everywhere.info.drawn_rate is None
    assert everywhere.info.reverted == ()
    for name, tensor in dare.tensors.items():
        assert torch.equal(everywhere.tensors[name].indices, tensor.indices)


def test_what_is_left_out_is_the_bases_after_applying():
    base, _ = pair()
    delta = plan_of().draw(PruningSpec("refit", 0.8))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    delta.apply_(base, force=True)
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == MAPS


def test_a_rate_that_keeps_more_than_the_maps_have_is_refused():
    with pytest.raises(ValueError, match=r"keeps more than the .* entries that refit covers: take a rate of 0"):
        plan_of().draw(PruningSpec("refit", 0.0))


def test_nothing_to_cover_is_refused():
    with pytest.raises(ValueError, match="refit covers none of the tensors in scope"):
        plan_of(Scope(include=("norm.*",))).draw(PruningSpec("refit", 0.9))


def test_a_vocabulary_that_grew_is_refused_with_the_cure():
    base, finetuned = pair()
    finetuned.embed = nn.Embedding(40, 8)
    with pytest.raises(ValueError, match=r"embed.weight .*more rows.*carry="):
        prune(base, finetuned, "lowrank", rank=1)
    delta = prune(base, finetuned, "lowrank", rank=1, carry=["embed.weight"])
    assert set(delta.carried) == {"embed.weight"}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_only_methods_that_say_so_leave_tensors_out(method):
    row = METHODS[method]
    assert (row.covers is not None) == (method in ("refit", "lowrank"))


@pytest.mark.parametrize(("spread", "one_direction"), [("even", 0), ("energy", 33 + 8)])
def test_the_rate_of_low_rank_is_that_of_its_numbers(spread, one_direction):
    plan, spec = plan_of(), PruningSpec("lowrank", method_settings={"rank": 2, "spread": spread})
    delta = plan.draw(spec)
    entries = sum(plan.finetuned[name].numel() for name in plan.pruned)
    assert delta.pruning_rate == plan.rate_of(spec)
    unused = (1 - delta.pruning_rate) * entries - delta.num_factor_numbers
    assert -1e-6 < unused <= one_direction + 1e-6
    assert plan.rate_of(PruningSpec("dare", 0.37)) == 0.37
