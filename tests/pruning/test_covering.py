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


def test_with_a_rank_the_rate_plays_no_part_however_small_the_share_of_the_maps():
    base = {"embeddings.weight": torch.randn(3000, 16), "layers.0.a.weight": torch.randn(32, 16)}
    finetuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
    delta = prune(base, finetuned, "lowrank", rank=4)
    assert delta.tensors["layers.0.a.weight"].factors.rank == 4
    with pytest.raises(ValueError, match="keeps more than the 512 of 48,512 entries"):
        prune(base, finetuned, "lowrank", spread="even")


def test_the_weight_of_one_output_is_a_map_and_a_token_of_one_row_is_none():
    base = {name: torch.zeros(shape) for name, shape in
            {"layers.0.a.weight": (8, 6), "head.weight": (1, 8), "conv.weight": (1, 3, 3, 3), "cls_token": (1, 1, 8),
             "token_type_embeddings.weight": (1, 8)}.items()}  # fmt: skip
    finetuned = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    delta = prune(base, finetuned, "lowrank", rank=6, factors_dtype="float32")
    assert delta.info.reverted == ("cls_token", "token_type_embeddings.weight")
    for name in ("layers.0.a.weight", "head.weight", "conv.weight"):
        torch.testing.assert_close(delta.tensors[name].dense(1.0), finetuned[name])


@pytest.mark.parametrize("method", ["lowrank", "dare"])
def test_where_a_head_alone_was_trained_it_is_all_there_is(method):
    base = {"layers.0.a.weight": torch.randn(8, 6), "classifier.weight": torch.randn(2, 8)}
    finetuned = {**base, "classifier.weight": torch.randn(2, 8)}
    settings = {"rank": 2} if method == "lowrank" else {}
    delta = prune(base, finetuned, method, 0.9, carry=["classifier.*"], **settings)
    assert not delta.tensors
    assert torch.equal(delta.carried["classifier.weight"], finetuned["classifier.weight"])


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
