"""Every method through the callback: scores are those of the saved deltas, data and settings reach the methods."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tiny import Foreign, train_loader, trainer, val_loader
from torch import nn

from dpp_lightning import METHODS, SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback


def logits(module, batch):
    return module.net(batch[0])


def fit(callback, module=None, **settings):
    module = module or Foreign()
    runner = trainer(callback, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.fit(module, train_loader(), val_loader())
    return module


def accuracy(module):
    correct = [(module.net(x).argmax(1) == y).float().mean() for x, y in val_loader()]
    return float(torch.stack(correct).mean())


def test_all_methods_in_one_run(tmp_path):
    torch.manual_seed(0)
    module = Foreign()
    base = {n: t.detach().clone() for n, t in module.state_dict().items()}
    callback = DeltaPruneCallback(
        list(METHODS), [0.8, 0.95], [0, 1], monitor="acc", output_dir=str(tmp_path), forward_fn=logits,
        method_settings={"importance": {"score": "activation"}, "struct-dare": {"b": 0.5}, "darex-q-layer": {"rows": "median"},
                         "lowrank": {"rank": 2}, "auto": {"max_bytes": 9000}},
        blocks=["*"],
    )  # fmt: skip
    fit(callback, module)
    rows = {(r.method, r.pruning_rate, r.seed): r for r in callback.results if r.pruning_rate}
    num_random = sum(method.random for method in METHODS.values())
    assert len(rows) == 2 * (2 * num_random + len(METHODS) - num_random)
    module.load_state_dict(base)
    for row in rows.values():
        delta = SparseDelta.from_pretrained(tmp_path / row.folder)
        with delta.applied(module):
            assert accuracy(module) == pytest.approx(row.score, abs=1e-6), row.method
        if METHODS[row.method].fit or row.method == "wanda":
            assert "train" in row.q_split
    dare, learned = rows["dare", 0.8, 0], rows["darex-learned", 0.8, 0]
    assert learned.score != dare.score or learned.num_bytes != dare.num_bytes
    saved = SparseDelta.from_pretrained(tmp_path / "importance-p0.8-seed0").info.settings
    assert saved == {"score": "activation"}
    for method in ("refit", "lowrank", "auto"):
        training = SparseDelta.from_pretrained(tmp_path / rows[method, 0.8, 0].folder).info.training
        assert method == "auto" or training["texts"] == 600
        assert training.get("held_out_after", 0) <= training.get("held_out_before", 1)
    assert all(rows["auto", rate, 0].num_bytes <= 9000 for rate in (0.8, 0.95))


def test_labels_are_used_by_every_fit_under_the_metric(tmp_path):
    callback = DeltaPruneCallback(
        ["dppa", "dare-dpa", "darex-q-layer"], 0.8, monitor="acc", output_dir=str(tmp_path), objective="metric",
        calibration_dataloader=val_loader(100), forward_fn=logits, blocks=["*"],
    )  # fmt: skip
    fit(callback)
    dppa = SparseDelta.from_pretrained(tmp_path / "dppa-p0.8-seed0").info.settings
    assert dppa["partitions"] == [0.9, 0.8]
    assert all(f == 0 or f >= 1 for f in dppa["factors"])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["q_split"] for r in lines if r["pruning_rate"]} == {"calibration_dataloader="}


def unchanged_by_a_refusal(callback, message):
    """The callback refuses a fit before the first step of training."""
    module = Foreign()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(callback, module)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.by_blocks])
def test_a_method_by_blocks_refuses_a_model_without_before_training(tmp_path, method):
    callback = DeltaPruneCallback(["dare", method], 0.8, monitor="acc", output_dir=str(tmp_path), forward_fn=logits)
    unchanged_by_a_refusal(
        callback, f"^{method} goes by the linear maps in a model's blocks, and the names of the 6 .*"
    )


def test_a_rate_that_leaves_low_rank_nothing_is_refused_before_training(tmp_path):
    methods, folder = ["dare", "lowrank"], str(tmp_path)
    callback = DeltaPruneCallback(methods, [0.9, 0.9999], monitor="acc", output_dir=folder, forward_fn=logits)
    unchanged_by_a_refusal(
        callback, "^lowrank at pruning_rate=0.9999: a rate of .* fewer numbers than biases and norms"
    )


def test_a_method_by_blocks_refuses_blocks_that_are_not_trained(tmp_path):
    callback = DeltaPruneCallback("owl", 0.8, monitor="acc", output_dir=str(tmp_path), blocks=["[03]"])
    module = Foreign()
    module.net[0].requires_grad_(False)
    module.net[3].requires_grad_(False)
    with pytest.raises(ValueError, match=r"^owl goes .* names of the 2 tensors \(5\.weight, 5\.bias\)"):
        fit(callback, module)


def test_blocks_may_be_one_pattern_and_one_that_matches_nothing_is_refused(tmp_path):
    callback = DeltaPruneCallback("owl", 0.8, monitor="acc", output_dir=str(tmp_path), blocks="tower.cells.*")
    unchanged_by_a_refusal(callback, r"blocks pattern 'tower\.cells\.\*' matches none of the 6 tensors")


def test_learned_needs_logits_and_says_so_before_training(tmp_path):
    callback = DeltaPruneCallback("darex-learned", 0.8, monitor="acc", output_dir=str(tmp_path))
    module = Foreign()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match="forward_fn"):
        fit(callback, module)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_learned_works_on_frozen_parameters_and_outside_a_fit(tmp_path):
    """Trainer.validate runs in inference mode; parameters without requires_grad get gradients for the while."""
    torch.manual_seed(0)
    module = Foreign()
    save_file({n: t.contiguous() for n, t in module.state_dict().items()}, tmp_path / "base.safetensors")
    fit(DeltaPruneCallback("dare", 0.5, monitor="acc", output_dir=str(tmp_path / "a")), module)
    module.net[0].weight.requires_grad_(False)
    callback = DeltaPruneCallback(
        "darex-learned", 0.9, monitor="acc", output_dir=str(tmp_path / "b"), forward_fn=logits,
        pretrained=str(tmp_path / "base.safetensors"), calibration_dataloader=val_loader(64),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback).validate(module, val_loader(), verbose=False)
    assert callback.results[-1].method == "darex-learned"
    assert not module.net[0].weight.requires_grad
    assert module.net[2 if hasattr(module.net[2], "weight") else 3].weight.requires_grad


class TwoTowers(Foreign):
    """Half of the blocks are not reached by the data."""

    def __init__(self, spare: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20) for _ in range(2)])
        self.spare = nn.ModuleList([nn.Sequential(nn.Linear(20, 20)) for _ in range(spare)])

    def training_step(self, batch, batch_idx):
        unused = sum(block(batch[0]).square().mean() for block in self.spare)
        return super().training_step((self._through(batch[0]), batch[1]), batch_idx) + 0.01 * unused

    def validation_step(self, batch, batch_idx):
        super().validation_step((self._through(batch[0]), batch[1]), batch_idx)

    def _through(self, x):
        return x + sum(layer(x) for layer in self.layers)


def test_layers_that_the_data_does_not_reach_are_named_and_where_they_are_most_the_run_stops(tmp_path):
    def run(spare: int) -> None:
        callback = DeltaPruneCallback(
            "wanda",
            [0.8],
            [0],
            monitor="acc",
            output_dir=str(tmp_path),
            blocks=["layers.*", "spare.*"],
            output_layer="net",
        )
        trainer(callback).fit(TwoTowers(spare), train_loader(), val_loader())

    with pytest.warns(UserWarning, match=r"wanda .*1 of 6 linear maps .*spare.0.0.weight$"):
        run(1)
    with pytest.raises(ValueError, match=r"wanda goes by the inputs of linear maps, and 9 of 14 .*spare.0.0.weight"):
        run(9)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_methods_that_train_are_given_batches_in_the_trainers_precision(tmp_path, precision):
    """By a module whose inputs are floats, as the loops hand them over."""
    callback = DeltaPruneCallback(
        ["refit", "lowrank", "darex-learned"], 0.5, monitor="acc", output_dir=str(tmp_path), forward_fn=logits,
        method_settings={"lowrank": {"rank": 2}},
    )  # fmt: skip
    fit(callback, precision=precision)
    assert {row.method for row in callback.results if row.pruning_rate} == {"refit", "lowrank", "darex-learned"}


def test_a_module_that_takes_no_batch_is_told_of_forward_fn(tmp_path):
    class OfTwo(Foreign):
        def forward(self, x, y):
            return self.net(x)

    with pytest.raises(ValueError, match=r"give OfTwo a forward\(batch\).*TypeError.*forward_fn=lambda module, batch"):
        fit(DeltaPruneCallback("refit", 0.5, monitor="acc", output_dir=str(tmp_path)), OfTwo())
