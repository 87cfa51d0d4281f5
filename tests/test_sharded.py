"""Pruning, applying and the callback on parameters in shards: what one process gives, every rank gives."""

import distcases
import distjobs
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_glue import bert_config, make_data, make_model

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.names import check_prunable
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.optimization import with_schedule


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
    for name in ("dare-p0.9-seed0", "dare-p0.5-seed1"):
        one, many = (SparseDelta.from_pretrained(tmp_path / kind / name) for kind in ("single", "fsdp2"))
        assert one.tensors.keys() == many.tensors.keys()
        assert one.base_fingerprint == many.base_fingerprint
        for tensor, part in one.tensors.items():
            assert torch.equal(part.indices, many.tensors[tensor].indices)
        values = [{name: t.values for name, t in delta.tensors.items()} for delta in (one, many)]
        assert apart(*values) < 0.02


def test_shards_of_fsdp1_are_refused():
    flat = torch.nn.Parameter(torch.zeros(3))
    flat._fsdp_flattened = True
    with pytest.raises(ValueError, match="flattened by FSDP1; take FSDP2Strategy"):
        check_prunable({"a": flat})


def test_deepspeed_is_refused_with_the_alternative():
    class Trainer:
        strategy = object.__new__(DeepSpeedStrategy)

    with pytest.raises(ValueError, match=r"AdamR needs the parameters.*DeepSpeedStrategy.*fsdp\.yaml"):
        with_schedule(AdamR([torch.nn.Parameter(torch.zeros(1))]), "constant", "step", Trainer(), 0.0)
    with pytest.raises(ValueError, match="DeltaPruneCallback needs"):
        DeltaPruneCallback().setup(Trainer(), torch.nn.Module(), "fit")
