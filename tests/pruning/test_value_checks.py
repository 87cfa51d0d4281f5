"""Equal models, and models with NaN or infinity, are refused by every method in one line, in memory and from files."""

import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tiny import Net, pair
from torch import nn

from dpp_lightning import METHODS, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.cli import main
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.tensors.finite import count_non_finite, is_finite

FREE = [name for name, row in METHODS.items() if not row.inputs and (row.fit is None or not row.fit.required)]


def copied(model, change=None):
    other = Net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        if change is not None:
            change(other)
    return other


def saved(folder, **models):
    for name, model in models.items():
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors")
    return [folder / name for name in models]


def spoil(model, value):
    model.layers[1][2].weight.data.view(-1)[[3, 77]] = value
    model.norm.bias.data[0] = value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 262_143, 262_144, -1])
def test_one_entry_is_found_wherever_it_is(dtype, place):
    tensor = torch.ones(300_001, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(torch.full_like(tensor, torch.finfo(dtype).max)), "a sum that overflows is no infinity"
    for value, counts in ((torch.nan, (1, 0, 0)), (torch.inf, (0, 1, 0)), (-torch.inf, (0, 0, 1))):
        spoiled = tensor.clone()
        spoiled[place] = value
        assert not is_finite(spoiled)
        assert count_non_finite(spoiled) == counts
        assert not is_finite(spoiled[None].expand(2, -1).t())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["base", "fine-tuned model"])
@pytest.mark.parametrize("method", FREE)
def test_every_method_refuses_what_is_not_finite_alike(tmp_path, method, side, value):
    """At this rate most seeds of a random selection keep none of the three entries."""
    base, finetuned = pair()
    spoil((base, finetuned)[side == "fine-tuned model"], value)
    kind = "NaN" if value != value else "infinite"
    tensors = 14 if METHODS[method].covers is None else 13  # the embedding is the base's
    message = (
        rf"^the {side} is not finite in 2 of {tensors} tensors: layers.1.2.weight \(2 {kind}\), norm.bias \(1 {kind}\)"
    )
    with pytest.raises(ValueError, match=message):
        prune(base, finetuned, method, 0.9)
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(*saved(tmp_path, base=base, tuned=finetuned), tmp_path / "delta", PruningSpec(method, 0.9))
    assert not (tmp_path / "delta").exists()


def test_the_model_does_not_run_on_what_is_not_finite():
    class Data(Calibration):
        def layer_inputs(self):
            pytest.fail("the model ran")

    base, finetuned = pair()
    spoil(finetuned, torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        prune(base, finetuned, "wanda", 0.9, calibration=Data(lambda _: 0.0))


def test_both_sides_are_told_at_once():
    base, finetuned = pair()
    spoil(base, torch.nan)
    spoil(finetuned, torch.inf)
    with pytest.raises(ValueError, match=r"^the base is .*; the fine-tuned model is not finite in 2 of 14 tensors.*"):
        prune(base, finetuned, "dare", 0.9)


def test_masks_of_infinity_are_no_fault_and_carried_nan_is():
    base, finetuned = pair()
    for model in (base, finetuned):
        model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    prune(base, finetuned, "dare", 0.9)
    finetuned.mask[0] = 0
    assert prune(base, finetuned, "dare", 0.9).carried["mask"].isinf().any()
    finetuned.mask[0] = torch.nan
    with pytest.raises(ValueError, match=r"mask \(2 NaN, 2 infinite\)"):
        prune(base, finetuned, "dare", 0.9)


def test_tensors_that_stay_the_bases_may_hold_anything():
    base, finetuned = pair()
    base.norm.bias.data[0] = torch.inf
    finetuned.norm.load_state_dict(base.norm.state_dict())
    assert set(prune(base, finetuned, "dare", 0.9).info.unchanged) >= {"norm.bias", "norm.weight"}
    finetuned.head.weight.data[0] = torch.nan
    assert "head.weight" in prune(base, finetuned, "dare", 0.9, exclude=["head.weight"], outside="revert").info.reverted


def test_equal_models_are_refused(tmp_path, capfd):
    base, _ = pair()
    with pytest.raises(ValueError, match="equal in all 15 tensors: there is nothing to prune"):
        prune(base, copied(base))
    with pytest.raises(ValueError, match="nothing to prune"):
        prune(base.state_dict(), base.state_dict())
    folders = [str(folder) for folder in saved(tmp_path, base=base, tuned=base)]
    for command in (["prune", *folders, "--output", str(tmp_path / "delta")], ["inspect", *folders]):
        assert main(command) == 2
        assert "Is FINETUNED the right folder?" in capfd.readouterr().err
    assert not (tmp_path / "delta").exists()


def test_models_that_differ_outside_the_scope_alone():
    base, _ = pair()
    finetuned = copied(base, lambda model: model.head.weight.add_(1))
    with pytest.warns(UserWarning, match=r"nothing is pruned: .* stored dense \(head.weight\)"):
        delta = prune(base, finetuned, "dare", 0.9, include=["embed.*"])
    assert list(delta.carried) == ["head.weight"]
    with pytest.raises(ValueError, match=r"1 that differ \(head.weight\) are reverted to the base"):
        prune(base, finetuned, "dare", 0.9, include=["embed.*"], outside="revert")


def test_a_new_head_on_an_unchanged_body_is_a_delta_with_a_warning():
    base, _ = pair()
    finetuned = copied(base)
    finetuned.head = nn.Linear(8, 5)
    with pytest.warns(UserWarning, match="the delta consists of 2 tensors stored dense"):
        delta = prune(base, finetuned, "dare", 0.9)
    assert sorted(delta.carried) == ["head.bias", "head.weight"]


def test_a_delta_of_zeros_is_warned_of_wherever_it_passes(tmp_path):
    base, finetuned = pair()
    folders = saved(tmp_path, base=base, tuned=finetuned)
    nothing = r"changes nothing: none of its 14 tensors has a kept entry other than 0"
    with pytest.warns(UserWarning, match=f"the pruned delta {nothing}"):
        prune_checkpoint(*folders, tmp_path / "delta", PruningSpec("dare", 0.999999))
    with pytest.warns(UserWarning, match=f"the pruned delta {nothing}"):
        delta = prune(base, finetuned, "dare", 0.999999)
    with pytest.warns(UserWarning, match=f"this delta {nothing}"):
        delta.apply_(base)
    wide = [model.double().state_dict() for model in (copied(base), copied(base))]
    with pytest.warns(UserWarning, match="of two equal models"):
        prune(copied(base).state_dict(), wide[1], "dare", 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for command in ("apply", "merge"):
            assert main([command, str(folders[0]), str(tmp_path / "delta"), "--output", str(tmp_path / command)]) == 0
    told = [str(warning.message) for warning in caught if re.search(nothing, str(warning.message))]
    assert [message.split(" changes")[0] for message in told] == [str(tmp_path / "delta"), "the merged delta"]


def test_a_delta_that_changes_something_is_not_warned_of(tmp_path):
    base, finetuned = pair()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changes nothing")
        prune(base, finetuned, "dare", 0.9).apply_(copied(base))
        head = copied(base)
        head.head = nn.Linear(8, 5)
        delta = prune(base, head, "dare", 0.9)
        delta.save_pretrained(tmp_path / "delta")


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_mask_with_infinities_is_unchanged_in_another_dtype(tmp_path, dtypes):
    """Its other entries may be rounded by the cast; what base plus delta holds are the base's."""
    base, finetuned = pair()
    for model, dtype in zip((base, finetuned), dtypes, strict=True):
        mask = torch.full((5, 5), -torch.inf).triu(1)
        mask[1, 0] = 0.1 if dtypes[0] == torch.float32 else 0.5
        model.register_buffer("mask", mask)
        model.to(dtype)
    delta = prune(base, finetuned, "dare", 0.5)
    assert "mask" in delta.info.unchanged
    assert "mask" not in {**delta.tensors, **delta.carried}
    assert prune(*saved(tmp_path, base=base, tuned=finetuned), "dare", 0.5).info.unchanged == delta.info.unchanged
    before = base.mask.clone()
    with delta.applied(base):
        assert torch.equal(base.mask, before)


@pytest.mark.parametrize("change", ["place", "sign", "value", "overflow"])
def test_a_mask_with_other_infinities_or_values_is_none_that_is_unchanged(change):
    base, finetuned = pair()
    base.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
    other = base.mask.clone()
    if change == "place":
        other[4, 0] = -torch.inf
    elif change == "sign":
        other[0, 1] = torch.inf
    elif change == "value":
        other[4, 4] = 1.0
    else:  # finite in the base, beyond the other dtype's numbers
        base.mask[4, 4], other[4, 4] = -1e30, -torch.inf
    finetuned.register_buffer("mask", other)
    with pytest.raises(ValueError, match=r"not finite .*mask"):
        prune(base.state_dict(), finetuned.to(torch.float16).state_dict(), "dare", 0.5)
