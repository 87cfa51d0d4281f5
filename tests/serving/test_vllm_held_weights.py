"""A switch that fails on its way is taken back; where that fails too, nothing but a restart is accepted."""

import pytest
import torch

from dpp_lightning.serving.base_checkpoint import TensorChange
from dpp_lightning.serving.vllm.held_weights import HeldWeights


class Weights:
    """A model of one tensor for each name; its writes number ``failing`` fail before the second tensor."""

    def __init__(self, failing=()):
        self.values, self.failing, self.writes = {"first": "base", "second": "base"}, failing, 0

    def write(self, present, wanted):
        self.writes += 1
        for place, name in enumerate(self.values):
            if place == 1 and self.writes in self.failing:
                raise ValueError(f"no room in write {self.writes}")
            if name in present or name in wanted:
                self.values[name] = wanted[name].values() if name in wanted else "base"


def change(value):
    return {name: TensorChange(torch.tensor([0]), lambda: value, torch.zeros(1)) for name in ("first", "second")}


def test_switches_follow_one_another():
    weights = Weights()
    held = HeldWeights(weights.write)
    for wanted, value in ((change("A"), "A"), (change("B"), "B"), ({}, "base"), (change("A"), "A")):
        held.switch(wanted)
        assert set(weights.values.values()) == {value}


def test_a_switch_that_fails_is_taken_back_and_the_next_one_works():
    weights = Weights(failing=(2,))
    held = HeldWeights(weights.write)
    held.switch(change("A"))
    with pytest.raises(ValueError, match="no room in write 2; the weights are as before"):
        held.switch(change("B"))
    assert set(weights.values.values()) == {"A"}
    held.switch({})
    assert set(weights.values.values()) == {"base"}


def test_what_cannot_be_taken_back_asks_for_a_restart_from_then_on():
    weights = Weights(failing=(1, 2))
    held = HeldWeights(weights.write)
    with pytest.raises(RuntimeError, match=r"no room in write 1; .* could not be restored .*: restart the server"):
        held.switch(change("A"))
    for refused in (lambda: held.switch({}), held.check):
        with pytest.raises(RuntimeError, match=r"no known state .* restart the server"):
            refused()
    assert weights.writes == 2


def test_an_interrupt_asks_for_a_restart():
    def interrupted(present, wanted):
        raise KeyboardInterrupt

    held = HeldWeights(interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.switch(change("A"))
    with pytest.raises(RuntimeError, match="interrupted; restart the server"):
        held.switch({})
