"""Pruning, applying and the callback on parameters in shards: what one process gives, every rank gives."""

import distcases
import distjobs
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_causal import make_rows, save_decoder, write_rows
from tiny_glue import bert_config, make_data, make_model

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.optimization import with_schedule
from dpp_lightning.tensors.names import check_prunable


@pytest.mark.parametrize("method", ["dare", "magnitude", "importance", "owl", "struct-dare"])
@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_a_delta_drawn_from_shards_is_that_of_whole_tensors(method, kind, world):
    if method != "magnitude" and kind == "hsdp":
        pytest.skip("one method is enough to see that replicas are counted once")
    expected = distcases.prune_in_shards("single", method, 0.8)
    for found in distjobs.run(distcases.prune_in_shards, world, kind, method, 0.8).values():
        assert found["reverted"]
        assert found["fingerprint"] == expected["fingerprint"]
        for part in ("indices", "values", "carried", "applied"):
            assert found[part].keys() == expected[part].keys()
            assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items()), part


@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 2), ("hsdp", 4)])
def test_every_rank_refuses_a_value_that_only_one_of_them_holds(kind, world):
    expected = distcases.refusal_in_shards("single")
    assert "base is not finite in 1 of 6 tensors: 2.weight (1 infinite)" in expected
    assert "fine-tuned model is not finite in 1 of 6 tensors: 0.weight (1 NaN)" in expected
    assert set(distjobs.run(distcases.refusal_in_shards, world, kind).values()) == {expected}


def apart(ours, theirs):
    """Relative distance of two sets of tensors, less the biases of keys: their gradient is 0 but for rounding, which
    Adam scales up."""
    pairs = [(ours[name], tensor) for name, tensor in theirs.items() if "key.bias" not in name]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    still = bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return make_model(folder / "base", config=still), make_data(folder / "data", "sst2", n_train=160)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"optimizer": torch.optim.AdamW}], ids=["adamr", "adamw"])
def test_the_callback_in_fsdp2_gives_what_one_process_gives(glue, tmp_path, world, settings):
    if world == 1 and settings:
        pytest.skip("the optimizer makes no difference to one rank")
    expected = distcases.fit_glue("single", str(tmp_path / "single"), *glue, settings)
    results = distjobs.run(distcases.fit_glue, world, "fsdp2", str(tmp_path / "fsdp2"), *glue, settings, lightning=True)
    for found in results.values():
        assert apart(found["weights"], expected["weights"]) < 1e-3
        for ours, theirs in zip(found["rows"], expected["rows"], strict=True):
            assert ours[:3] == theirs[:3]
            assert ours[3] == (theirs[3] and pytest.approx(theirs[3], rel=0.02))
            assert ours[4] == pytest.approx(theirs[4], abs=0.1)
    for name in ("dare-p0.9-seed0", "dare-p0.5-seed0"):
        one, many = (SparseDelta.from_pretrained(tmp_path / kind / name) for kind in ("single", "fsdp2"))
        assert one.tensors.keys() == many.tensors.keys()
        assert one.base_fingerprint == many.base_fingerprint
        for tensor, part in one.tensors.items():
            assert torch.equal(part.indices, many.tensors[tensor].indices)
        values = [{name: t.values for name, t in delta.tensors.items()} for delta in (one, many)]
        assert apart(*values) < 0.02


def test_a_decoder_in_shards_generates_and_is_pruned_as_on_one_device(tmp_path):
    data = [
        write_rows(tmp_path / name, make_rows(count, seed))
        for name, count, seed in (("a.jsonl", 150, 0), ("b.jsonl", 9, 1))
    ]
    arguments = (save_decoder(tmp_path / "base"), *data)
    expected = distcases.fit_causal("single", str(tmp_path / "single"), *arguments)
    for found in distjobs.run(
        distcases.fit_causal, 2, "fsdp2", str(tmp_path / "fsdp2"), *arguments, lightning=True
    ).values():
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[0] == theirs[0]
            assert ours[1] == (theirs[1] and pytest.approx(theirs[1], rel=0.05))
            assert ours[2] == pytest.approx(theirs[2], abs=0.21)  # of 15 texts some turn on rounding
    assert expected[1][2] > 0.3


def fit_epochs(strategy, world, *arguments):
    if strategy == "single":
        return distcases.fit_epochs(strategy, *arguments)
    return distjobs.run(distcases.fit_epochs, world, strategy, *arguments, lightning=True)[0]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("fsdp2", 2), ("single", 1)),
        (("single", 1), ("fsdp2", 2)),
        pytest.param(("fsdp2", 2), ("fsdp2", 4), marks=pytest.mark.distributed),
        pytest.param(("fsdp2", 4), ("ddp", 2), marks=pytest.mark.distributed),
        pytest.param(("ddp", 2), ("fsdp2", 2), marks=pytest.mark.distributed),
    ],
)
def test_a_fit_goes_on_under_another_strategy_and_number_of_ranks(glue, tmp_path, first, then):
    whole = fit_epochs("single", 1, *glue, 2, None, str(tmp_path / "whole.ckpt"))
    fit_epochs(*first, *glue, 1, None, str(tmp_path / "first.ckpt"))
    resumed = fit_epochs(*then, *glue, 2, str(tmp_path / "first.ckpt"), str(tmp_path / "second.ckpt"))
    assert apart(resumed["weights"], whole["weights"]) < 1e-3
    assert resumed["pretrained"].keys() == whole["pretrained"].keys()
    assert all(torch.equal(resumed["pretrained"][name], tensor) for name, tensor in whole["pretrained"].items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_fit_resumed_in_the_middle_of_an_epoch_is_the_whole_one_bit_for_bit(glue, tmp_path, strategy):
    noisy, data = make_model(tmp_path / "base", config=bert_config()), glue[1]
    whole = fit_epochs(strategy, 2, noisy, data, 2, None, str(tmp_path / "whole.ckpt"), 4)
    resumed = fit_epochs(strategy, 2, noisy, data, 2, str(tmp_path / "step=12.ckpt"), str(tmp_path / "end.ckpt"))
    for kind, tensors in whole.items():
        assert all(torch.equal(resumed[kind][name], tensor) for name, tensor in tensors.items()), kind
    other = fit_epochs(strategy, 2, noisy, data, 2, str(tmp_path / "step=8.ckpt"), str(tmp_path / "end.ckpt"))
    assert all(torch.equal(other["weights"][name], tensor) for name, tensor in whole["weights"].items())


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("single", 1), ("fsdp2", 2)),
        pytest.param(("fsdp2", 2), ("ddp", 4), marks=pytest.mark.distributed),
        pytest.param(("ddp", 2), ("single", 1), marks=pytest.mark.distributed),
    ],
)
def test_a_fit_goes_on_in_the_middle_of_an_epoch_under_another_strategy(glue, tmp_path, first, then):
    whole = fit_epochs(*first, *glue, 2, None, str(tmp_path / "whole.ckpt"), 4)
    resumed = fit_epochs(*then, *glue, 2, str(tmp_path / "step=12.ckpt"), str(tmp_path / "end.ckpt"))
    assert apart(resumed["weights"], whole["weights"]) < 1e-3
    assert all(torch.equal(resumed["pretrained"][name], tensor) for name, tensor in whole["pretrained"].items())


def test_shards_of_fsdp1_are_refused():
    flat = torch.nn.Parameter(torch.zeros(3))
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="flattened by FSDP1; take FSDP2Strategy"):
        check_prunable({"a": flat})


def test_deepspeed_is_refused_with_the_alternative():
    class Trainer:
        strategy, callbacks, fast_dev_run = object.__new__(DeepSpeedStrategy), [], False

    with pytest.raises(ValueError, match=r"AdamR needs the parameters.*DeepSpeedStrategy.*fsdp\.yaml"):
        with_schedule(AdamR([torch.nn.Parameter(torch.zeros(1))]), "constant", "step", Trainer(), 0.0)
    with pytest.raises(ValueError, match="DeltaPruneCallback needs"):
        DeltaPruneCallback().setup(Trainer(), torch.nn.Module(), "fit")
