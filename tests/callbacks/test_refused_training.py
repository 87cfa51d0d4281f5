"""Methods that train by distillation are refused before the fit, in one line that names another way."""

import pytest

from dpp_lightning.callbacks.prune_run.calibration_data import refuse_training


@pytest.mark.parametrize("method", ["refit", "lowrank", "auto"])
def test_a_method_that_trains_is_refused_with_the_command_that_does_it(method):
    with pytest.raises(ValueError, match=f"dpp prune --method {method} --calibration") as caught:
        refuse_training(["dare", method], "DeltaPruneCallback")
    assert "\n" not in str(caught.value)


def test_methods_that_do_not_train_pass():
    refuse_training(["dare", "darex-q", "darex-learned", "wanda"], "DeltaPruneCallback")
