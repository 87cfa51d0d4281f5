"""AdamR on several ranks takes the steps that it takes on one, however the parameters are shared out."""

import distcases
import distjobs
import pytest
import torch

SETTINGS = {
    "l2": {"delta_decay": 0.05},
    "l1": {"delta_decay": 0.001, "norm": "l1"},
    "amsgrad": {"delta_decay": 0.05, "amsgrad": True},
    "one by one": {"delta_decay": 0.05, "foreach": False},
    "bfloat16": {"delta_decay": 0.05, "pretrained_dtype": "bfloat16"},
}


def agree(found, expected):
    for kind in ("weights", "pretrained"):
        for name, tensor in expected[kind].items():
            if kind in found:
                assert found[kind][name].shape == tensor.shape
                assert torch.allclose(found[kind][name], tensor, atol=2e-6), (kind, name)
    if "sums" in found:
        assert found["sums"] == pytest.approx(expected["sums"], rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_fsdp2_equals_one_process(settings, world):
    expected = distcases.train("single", settings)
    found = distjobs.run(distcases.train, world, "fsdp2", settings)
    assert len(found) == world
    for result in found.values():
        agree(result, expected)
        assert all(torch.equal(result["pretrained"][n], t) for n, t in expected["pretrained"].items())
    if world == 4:
        assert {result["parts"]["4.bias"] for result in found.values()} == {0, 1}  # some ranks hold nothing of it


@pytest.mark.parametrize("case", ["l2", "bfloat16"])
@pytest.mark.parametrize(("kind", "world"), [("ddp", 2), ("hsdp", 4), ("tp", 4), ("fsdp1-FULL_SHARD", 2)])
def test_other_ways_of_sharing_equal_one_process(kind, world, case):
    expected = distcases.train("single", SETTINGS[case])
    for result in distjobs.run(distcases.train, world, kind, SETTINGS[case]).values():
        agree(result, expected)


def test_a_group_of_new_parameters_is_not_decayed_in_shards_either():
    expected = distcases.train("single", SETTINGS["l2"], head=True)
    for result in distjobs.run(distcases.train, 2, "fsdp2", SETTINGS["l2"], 4, True).values():
        agree(result, expected)
        assert not any(name.startswith("4.") for name in result["pretrained"])


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp1-SHARD_GRAD_OP", "fsdp1-NO_SHARD", "fsdp1-FULL_SHARD"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_strategy_of_fsdp1_equals_one_process(kind, settings):
    expected = distcases.train("single", settings)
    for result in distjobs.run(distcases.train, 2, kind, settings).values():
        agree(result, expected)


@pytest.mark.parametrize(("kind", "world", "expected"), [("fsdp2", 2, 1), ("hsdp", 4, 1), ("ddp", 2, 0)])
def test_one_reduction_a_mesh(kind, world, expected):
    assert set(distjobs.run(distcases.reductions, world, kind).values()) == {expected}
