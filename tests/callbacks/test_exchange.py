"""Weights that change places with the base's: an interrupt at any line loses no value of either model."""

from functools import cache

import pytest
import torch
from interrupted import Interrupt, at_every_line, interrupt_at, lines_of
from torch import nn

from dpp_lightning import prune
from dpp_lightning.callbacks.apply_delta import ApplyDelta
from dpp_lightning.callbacks.prune_run.base_weights import BaseWeights
from dpp_lightning.callbacks.prune_run.best_weights import _Values
from dpp_lightning.callbacks.prune_run.exchanged_models import leave_pruned
from dpp_lightning.callbacks.prune_run.lora_view import adapter_view
from dpp_lightning.tensors.interrupts import restored_after

NAMES = ["0.weight", "1.weight", "1.bias"]


def models():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    base = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    return module, BaseWeights(base, explicit=True)


def values(module, base):
    return {f"{where} {name}": tensor.clone() for where, tensors in (("module", module.state_dict()), ("base", base.tensors))
            for name, tensor in tensors.items()}  # fmt: skip


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def exchange(module, base, inside=lambda: None):
    with base.exchanged(module, NAMES):
        inside()


def test_inside_they_have_changed_places_and_afterwards_not():
    module, base = models()
    before, inside = values(module, base), {}
    exchange(module, base, lambda: inside.update(values(module, base)))
    swapped = {name.replace("module", "new").replace("base", "module").replace("new", "base"): t for name, t in before.items()}  # fmt: skip
    assert same(inside, swapped)
    assert same(values(module, base), before)


def unchanged(make):
    """A check that both models hold what ``make`` gave them, bit for bit."""
    before = values(*make())

    def check(module, base):
        assert same(values(module, base), before)

    return check


def test_an_exchange_interrupted_at_every_line_is_put_back():
    at_every_line(models, exchange, unchanged(models), more_than=100)


@cache
def drawn():
    module, base = models()
    finetuned = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return prune(base.tensors, finetuned, "magnitude", 0.5)


def pruned():
    """Both models and a delta that is applied to none."""
    return *models(), drawn().with_changes()


def test_pruned_weights_are_left_whole_or_not_at_all():
    module, base, delta = pruned()
    finetuned = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    leave_pruned(module, base, NAMES, delta)
    applied = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    outcomes = []

    def check(module, base, _):
        held = module.state_dict()
        outcomes.append([same(held, whole) for whole in (finetuned, base.tensors, applied)])
        assert sum(outcomes[-1]) == 1

    at_every_line(pruned, lambda m, b, d: leave_pruned(m, b, NAMES, d), check, more_than=0)
    assert all(map(any, zip(*outcomes, strict=True)))  # each of the three is met


def test_a_delta_of_a_run_that_is_interrupted_at_any_line_is_taken_off():
    """As Lightning does: ``on_exception`` follows whatever happened in the start of the run."""
    module, base, delta = pruned()
    module.load_state_dict(base.tensors)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    applied = ApplyDelta("unused")
    applied._delta = delta
    total = lines_of(lambda: applied.on_validation_start(None, module))
    assert not same(module.state_dict(), before)
    applied.on_exception(None, module, KeyboardInterrupt())
    for line in range(1, total + 1):
        applied._delta = delta.with_changes()
        with pytest.raises(Interrupt):
            interrupt_at(line, lambda: applied.on_validation_start(None, module))
        applied.on_exception(None, module, KeyboardInterrupt())
        assert same(module.state_dict(), before), line


def load_others(module, _):
    last = _Values(module)
    with restored_after(last.put_back), torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def test_the_best_weights_interrupted_at_every_line_give_way_to_the_last():
    at_every_line(models, load_others, unchanged(models), more_than=30)


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    module = peft.get_peft_model(models()[0], peft.LoraConfig(r=1, target_modules=["0", "1"], init_lora_weights=False))
    return module, BaseWeights.from_module(module)


def view(module, base):
    with adapter_view(module, base, "merged"):
        pass


def test_a_view_of_a_merged_adapter_interrupted_at_every_line_is_put_back():
    put_back = unchanged(adapted)

    def check(module, base):
        put_back(module, base)
        assert not any(getattr(part, "merged", False) for part in module.modules())

    at_every_line(adapted, view, check, more_than=300)
