"""A fit ends well though its weights diverged or did not change; what is wrong with the base is said before it starts."""

import json

import pytest
import torch
from prune_fits import callback, equal, weights
from safetensors.torch import save_file
from tiny import Foreign, train_loader, trainer, val_loader
from torch import nn


class Diverging(Foreign):
    """One entry becomes NaN in the last step: the score may hide it, and most masks leave it out."""

    def on_train_epoch_end(self):
        if self.current_epoch == self.trainer.max_epochs - 1:
            self.net[3].weight.data[5, 7] = float("nan")


@pytest.mark.parametrize("method", ["dare", "darex-q", "magnitude", "importance"])
def test_a_diverged_fit_ends_with_a_line_that_says_so(tmp_path, method):
    module, pruned = Diverging(), callback(tmp_path / "out", method=method, apply=method == "dare")
    run = trainer(pruned)
    with pytest.warns(
        UserWarning, match=r"did not prune: the fine-tuned model is not finite in 1 of 6 .*\(1 NaN\)"
    ) as told:
        run.fit(module, train_loader(), val_loader())
    assert all("\n" not in str(warning.message) for warning in told if "did not prune" in str(warning.message))
    assert run.state.finished
    assert pruned.results == []
    assert not (tmp_path / "out").exists(), "no empty folder is left behind"
    assert int(module.net[3].weight.isnan().sum()) == 1, "the weights stay what training made of them"


@pytest.mark.parametrize("method", ["dare", "darex-q", "magnitude", "importance"])
def test_a_fit_that_changes_nothing_ends_with_a_table_and_a_warning(tmp_path, method):
    module, pruned = Foreign(learning_rate=0.0), callback(tmp_path, method=method)
    before, run = weights(module), trainer(pruned)
    with pytest.warns(UserWarning, match="equal in all 6 tensors: every delta is empty"):
        run.fit(module, train_loader(), val_loader())
    assert run.state.finished
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({row["score"] for row in rows}) == 1
    assert equal(weights(module), before)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_base_of_another_model_or_quantised_is_refused_before_training(tmp_path, quantised):
    module = Foreign()
    state = {name: tensor.clone() for name, tensor in module.net.state_dict().items()}
    if quantised:
        state |= {"3.weight": torch.ones(64, 64, dtype=torch.int8), "3.SCB": torch.ones(64)}
        message = "is quantised .1 tensors in bitsandbytes int8: 3.weight"
    else:
        wide = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
        state, message = wide.state_dict(), "do not have the same layers: of 6 tensors in common 5"
    save_file(state, tmp_path / "base.safetensors")
    run = trainer(callback(tmp_path / "out", pretrained=str(tmp_path / "base.safetensors")))
    with pytest.raises(ValueError, match=message):
        run.fit(module, train_loader(), val_loader())
    assert run.global_step == 0


def test_a_quantised_module_is_refused_before_training(tmp_path):
    module = Foreign()
    module.net[3].weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
    run = trainer(callback(tmp_path))
    with pytest.raises(ValueError, match=r"is quantised .1 tensors in int8: 3\.weight"):
        run.fit(module, train_loader(), val_loader())
