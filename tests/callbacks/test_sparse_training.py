"""SparseTraining: only the chosen entries change, as in a slow twin that masks gradients; state is of their size."""

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from prune_fits import equal, weights
from tiny import Foreign, train_loader, trainer, val_loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback, SparseTraining
from dpp_lightning.optim import AdamR
from dpp_lightning.sampling.sampler import kept_positions
from dpp_lightning.tensors.names import canonical_tensors
from dpp_lightning.trainer.strategies import FSDP2Strategy

MASKS = ("random", "magnitude", "fisher", "gradient", "diff", "diff-struct")


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def adamr(parameters, lr):
    return AdamR(parameters, lr=lr, delta_decay=0.05)


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=10 * lr, momentum=0.9)


def two_groups(parameters, lr):
    parameters = list(parameters)
    decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1}
    return torch.optim.AdamW([decayed, {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=lr)


def module(optimizer=adamw, seed=0):
    torch.manual_seed(seed)
    return Foreign(optimizer=optimizer)


def fit(lit, *callbacks, ckpt_path=None, **settings):
    torch.manual_seed(1)
    run = trainer(*callbacks, **settings)
    run.fit(lit, train_loader(), val_loader(), ckpt_path=ckpt_path)
    return run


def changed(before, after):
    return {name: (after[name] != tensor).flatten().nonzero().flatten() for name, tensor in before.items()}


class DenseTwin(pl.Callback):
    """The same training with dense state: masked gradients, and the entries outside put back after each step."""

    def __init__(self, positions):
        self.masks = positions

    def on_fit_start(self, trainer, pl_module):
        self.base = {n: t.detach().clone() for n, t in canonical_tensors(pl_module).items()}

    def _outside(self, name, tensor):
        outside = torch.ones(tensor.numel(), dtype=torch.bool)
        outside[self.masks[name]] = False
        return outside.view(tensor.shape)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, tensor in canonical_tensors(pl_module).items():
            tensor.grad[self._outside(name, tensor)] = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            for name, tensor in canonical_tensors(pl_module).items():
                outside = self._outside(name, tensor)
                tensor[outside] = self.base[name][outside]


@pytest.mark.parametrize("mask", MASKS)
def test_the_chosen_entries_change_and_no_other(mask):
    lit, sparse = module(), SparseTraining(mask, 0.9)
    before = weights(lit)
    fit(lit, sparse)
    names = {f"net.{name}": positions for name, positions in sparse._positions.items()}
    for name, positions in changed(before, weights(lit)).items():
        assert set(positions.tolist()) <= set(names[name].tolist())
    num_changed = sum(len(positions) for positions in changed(before, weights(lit)).values())
    assert 0.95 * sparse.num_kept < num_changed <= sparse.num_kept  # a unit that is never active gives no gradient
    sizes = [tensor.numel() for tensor in before.values()]
    assert sparse.num_entries == sum(sizes)
    if mask != "random":
        assert sparse.num_kept == sum(size - size * 9 // 10 for size in sizes)


@pytest.mark.parametrize("optimizer", [adamw, adamr])
def test_the_state_of_the_optimizer_has_the_size_of_the_trained_entries(optimizer):
    sparse = SparseTraining("magnitude", 0.9)
    run = fit(module(optimizer), sparse)
    states = run.optimizers[0].state.values()
    names = ["exp_avg", "exp_avg_sq"] + (["pretrained"] if optimizer is adamr else [])
    assert [sum(state[name].numel() for state in states) for name in names] == [sparse.num_kept] * len(names)


@pytest.mark.parametrize("optimizer", [adamw, sgd, two_groups])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}])
def test_the_weights_are_those_of_a_twin_with_dense_state(optimizer, settings):
    sparse, lit, twin = SparseTraining("random", 0.8, seed=3), module(optimizer), module(optimizer)
    fit(lit, sparse, **settings)
    fit(twin, DenseTwin(sparse._positions), **settings)
    for name, tensor in weights(twin).items():
        torch.testing.assert_close(weights(lit)[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_adamr_pulls_the_trained_entries_toward_the_base():
    distances = []
    for strength in (0.0, 0.5):
        lit = module(lambda parameters, lr, decay=strength: AdamR(parameters, lr=lr, delta_decay=decay))
        before = weights(lit)
        fit(lit, SparseTraining("magnitude", 0.9))
        distances.append(sum(float((lit.state_dict()[n] - t).norm()) for n, t in before.items()))
    assert 0 < distances[1] < 0.7 * distances[0]


def test_random_entries_are_those_of_the_sampler_at_this_rate_and_seed():
    sparse = SparseTraining("random", 0.9, seed=5)
    fit(module(), sparse, max_epochs=1)
    for name, tensor in canonical_tensors(module()).items():
        assert sparse._positions[name].tolist() == kept_positions(name, tensor.numel(), 0.9, 5).tolist()


def test_magnitude_takes_the_largest_weights_of_the_model_or_of_each_tensor():
    lit = module()
    tensors = canonical_tensors(weights(lit))
    everything = torch.cat([tensor.abs().flatten() for tensor in tensors.values()])
    of_model, of_tensors = SparseTraining("magnitude", 0.9, budget="model"), SparseTraining("magnitude", 0.9)
    fit(lit, of_model, max_epochs=1)
    fit(module(), of_tensors, max_epochs=1)
    least = everything.sort(descending=True)[0][of_model.num_kept - 1]
    for name, tensor in tensors.items():
        assert of_model._positions[name].tolist() == (tensor.flatten().abs() >= least).nonzero().flatten().tolist()
        assert len(of_tensors._positions[name]) == tensor.numel() - int(tensor.numel() * 9 // 10)


@pytest.mark.parametrize(("mask", "power"), [("fisher", 2), ("gradient", 1)])
def test_masks_by_gradients_are_those_of_the_mean_over_batches(mask, power):
    lit, sparse = module(), SparseTraining(mask, 0.9, batches=4, budget="model")
    data = train_loader().dataset
    x = torch.stack([data[i * (600 // 128)][0] for i in range(128)])
    y = torch.stack([data[i * (600 // 128)][1] for i in range(128)])
    total = {name: torch.zeros_like(tensor) for name, tensor in canonical_tensors(lit).items()}
    for start in range(0, 128, 32):
        loss = nn.functional.cross_entropy(lit.net(x[start : start + 32]), y[start : start + 32])
        gradients = torch.autograd.grad(loss, list(canonical_tensors(lit).values()))
        for (name, sum_), gradient in zip(total.items(), gradients, strict=True):
            total[name] = sum_ + gradient**power
    fit(lit, sparse, max_epochs=1)
    least = torch.cat([t.abs().flatten() for t in total.values()]).sort(descending=True)[0][sparse.num_kept - 1]
    for name, tensor in total.items():
        assert sparse._positions[name].tolist() == (tensor.flatten().abs() >= least).nonzero().flatten().tolist()


def test_gradients_before_the_first_step_leave_the_training_as_it_is():
    def run(mask):
        class Noting(Foreign):
            def __init__(self):
                super().__init__(optimizer=lambda p, lr: torch.optim.SGD(p, lr=0.0), dropout=0.5)
                self.mean = MeanMetric()

            def training_step(self, batch, batch_idx):
                self.log("loss", loss := super().training_step(batch, batch_idx))
                self.mean.update(loss.detach())
                if self.training:
                    losses.append((float(loss.detach()), torch.get_rng_state().sum().item(), self.mean.update_count))
                return loss

        losses = []
        torch.manual_seed(0)
        fit(Noting(), *mask, max_epochs=1)
        return losses

    assert run([SparseTraining("fisher", 0.9)]) == run([])


@pytest.mark.parametrize("optimizer", [adamw, adamr])
@pytest.mark.parametrize("mask", MASKS[:4])  # the gates of the others depend on the length of the training
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, mask, optimizer):
    def loader():
        return DataLoader(train_loader(160).dataset, 32)

    whole = module(optimizer)
    trainer(SparseTraining(mask, 0.9), max_epochs=4).fit(whole, loader(), val_loader())
    half = trainer(SparseTraining(mask, 0.9), max_epochs=2)
    half.fit(module(optimizer), loader(), val_loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(optimizer)
    again = trainer(SparseTraining(mask, 0.9), max_epochs=4)
    again.fit(resumed, loader(), val_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("step", [5, 10, 15])
def test_diff_pruning_resumes_before_at_and_after_the_end_of_the_gates(tmp_path, step):
    def run(lit, ckpt_path=None, *more):
        loader = DataLoader(train_loader(160).dataset, 32)
        trainer(SparseTraining("diff", 0.9), *more, max_epochs=4, enable_checkpointing=bool(more)).fit(
            lit, loader, val_loader(), ckpt_path=ckpt_path
        )
        return weights(lit)

    saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1)
    whole = run(module(adamr), None, saved)
    assert equal(run(module(adamr), tmp_path / f"step={step}.ckpt"), whole)


def test_a_training_that_ends_before_its_mask_is_fixed_says_so_and_leaves_a_sparse_delta():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    lit, sparse = module(), SparseTraining("diff", 0.9)
    before = weights(lit)
    with pytest.warns(UserWarning, match="lower gate_share"):
        fit(lit, sparse, Stop())
    assert 0 < sum(len(c) for c in changed(before, weights(lit)).values()) <= sparse.num_kept < 600


def test_a_mask_by_seed_stores_no_positions_in_checkpoints():
    for mask, stored in (("random", False), ("magnitude", True)):
        sparse = SparseTraining(mask, 0.9)
        fit(module(), sparse, max_epochs=1)
        assert bool(sparse.state_dict()["positions"]) is stored


@pytest.mark.parametrize(
    ("mask", "method", "positions"), [("random", "random-drop", "seed"), ("fisher", "magnitude", "index")]
)
def test_the_delta_of_the_trained_model_is_saved_without_loss(tmp_path, mask, method, positions):
    lit = module()
    base = module()
    prune = DeltaPruneCallback(method, 0.9, 4, monitor="acc", output_dir=str(tmp_path))
    fit(lit, SparseTraining(mask, 0.9, seed=4), prune)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert json.loads((folder / "delta_config.json").read_text())["positions"] == positions
    delta = SparseDelta.from_pretrained(folder)
    assert prune.results[-1].score == prune.results[1].score
    delta.apply_(base)
    for name, tensor in weights(lit).items():
        torch.testing.assert_close(weights(base)[name], tensor, rtol=0, atol=1e-7)


def test_a_new_head_and_what_is_carried_are_trained_whole_and_what_is_reverted_not_at_all():
    lit = module()
    lit.new_parameter_names = ("net.5.weight", "net.5.bias")
    before = weights(lit)
    sparse = SparseTraining("random", 0.9, carry=["0.bias"], exclude=["3.*"], outside="revert")
    fit(lit, sparse)
    counts = {name: len(positions) for name, positions in changed(before, weights(lit)).items()}
    assert counts["net.5.weight"] == lit.net[5].weight.numel()
    assert counts["net.0.bias"] > 0.9 * lit.net[0].bias.numel()
    assert counts["net.3.weight"] == counts["net.3.bias"] == 0
    assert 0 < counts["net.0.weight"] <= len(sparse._positions["0.weight"]) == sparse.num_kept


WITH_SCALER = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


class Manual(Foreign):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Stream(IterableDataset):
    def __iter__(self):
        return iter(train_loader().dataset)


@pytest.mark.parametrize(
    ("lit", "settings", "message"),
    [
        (Manual, {}, "set automatic_optimization to True"),
        (Foreign, {"plugins": [WITH_SCALER]}, "take precision bf16-mixed"),
        (lambda: Foreign(optimizer=torch.optim.LBFGS), {}, "take AdamW, AdamR or SGD"),
        (lambda: Foreign(optimizer=lambda _, lr: adamw(module().parameters(), lr)), {}, "made anew for each fit"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(lit, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(SparseTraining(), **settings).fit(lit(), train_loader(), val_loader())


@pytest.mark.parametrize("strategy", [FSDPStrategy(), FSDP2Strategy()])
def test_strategies_that_shard_parameters_are_refused(strategy):
    with pytest.raises(ValueError, match="shards them: take"):
        SparseTraining().setup(SimpleNamespace(strategy=strategy), module(), "fit")


def test_gates_need_the_length_of_the_training():
    with pytest.raises(ValueError, match="set max_steps or max_epochs"):
        trainer(SparseTraining("diff"), max_epochs=-1).fit(module(), train_loader(), val_loader())


def test_gradients_of_a_stream_are_refused():
    with pytest.raises(ValueError, match="is a stream"):
        trainer(SparseTraining("fisher")).fit(module(), DataLoader(Stream(), 32), val_loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "largest"}, "mask must be one of random, magnitude"),
        ({"pruning_rate": 1.0}, r"must be in \[0, 1\)"),
        ({"batches": 0}, "at least 1"),
        ({"seed": -1}, "an integer >= 0"),
        ({"mask": "diff", "gate_share": 1.0}, "gate_share must be in"),
        ({"budget": "layer"}, "budget must be one of"),
    ],
)
def test_wrong_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseTraining(**settings)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    fit(module(), max_epochs=1).save_checkpoint(tmp_path / "dense.ckpt")
    fit(module(), SparseTraining("random", 0.9), max_epochs=1).save_checkpoint(tmp_path / "sparse.ckpt")
    with pytest.raises(ValueError, match="of a training without SparseTraining"):
        fit(module(), SparseTraining("random", 0.9), ckpt_path=tmp_path / "dense.ckpt")
    with pytest.raises(ValueError, match=r"pruning_rate=0.9, now 0.8"):
        fit(module(), SparseTraining("random", 0.8), ckpt_path=tmp_path / "sparse.ckpt")


@pytest.mark.parametrize("mask", MASKS)
def test_tensors_that_are_reverted_are_not_trained_by_any_mask(mask):
    lit = module()
    before = weights(lit)
    fit(lit, SparseTraining(mask, 0.5, exclude=["0.*"], outside="revert", batches=2), max_epochs=2)
    differ = changed(before, weights(lit))
    assert not any(len(places) for name, places in differ.items() if name.startswith("net.0."))
    assert any(len(places) for places in differ.values())


@pytest.mark.parametrize(
    ("mask", "other", "message"),
    [
        ("diff", EMAWeightAveraging(), "EMAWeightAveraging averages weights from before the mask is fixed"),
        ("diff-struct", StochasticWeightAveraging(swa_lrs=0.01), "StochasticWeightAveraging averages"),
        ("random", BackboneFinetuning(), "BackboneFinetuning adds parameters to the optimizer.*outside='revert'"),
    ],
)
def test_callbacks_that_change_what_is_trained_are_refused(mask, other, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), SparseTraining(mask, 0.5), other)


def test_two_parameters_on_one_memory_are_refused():
    lit = module()
    lit.net[3].weight.data = lit.net[0].weight.data.view(-1)[:64].repeat(64).view(64, 64)
    lit.net[5].weight.data = lit.net[3].weight.data[:3]
    with pytest.raises(ValueError, match=r"of shapes \(64, 64\) and \(3, 64\), lie on one memory"):
        fit(lit, SparseTraining("random", 0.9))


@pytest.mark.parametrize("later", ["unfrozen", "added"])
def test_what_is_trained_later_is_refused_when_it_comes(later):
    class Later(Foreign):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.Adam(self.net.parameters() if later == "unfrozen" else self.net[3:].parameters(), 1e-3)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)
                if later == "added":
                    self.optimizers().add_param_group({"params": self.net[0].parameters()})

    with pytest.raises(RuntimeError, match="before the training begins"):
        fit(Later(), SparseTraining("random", 0.9))


def test_gradients_before_the_first_step_leave_what_a_training_step_changes():
    class Queue(Foreign):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(20))
            self.register_buffer("steps", torch.tensor(0))

        def training_step(self, batch, batch_idx):
            self.center.lerp_(batch[0].mean(0), 0.1)
            self.steps += 1
            return super().training_step(batch, batch_idx)

    ends = []
    for mask in ("magnitude", "fisher"):
        lit = Queue()
        fit(lit, SparseTraining(mask, 0.9))
        ends.append((lit.steps.item(), lit.center.clone()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])
