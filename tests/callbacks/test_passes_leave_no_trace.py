"""Passes that score pruned models change nothing in the module but what is asked for, and see one state each."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from tiny import Foreign, train_loader, trainer, val_loader
from torch import nn

from dpp_lightning.callbacks import DeltaPruneCallback


def pruning(tmp_path, methods="dare", **settings):
    settings = {"monitor": "acc", **settings}
    return DeltaPruneCallback(methods, 0.5, output_dir=str(tmp_path / "deltas"), **settings)


class Counting(Foreign):
    """Keeps a best score as torchmetrics does, a list of scores, and a buffer that every forward changes."""

    def __init__(self):
        super().__init__()
        self.best = torchmetrics.MaxMetric()
        self.highest = 0.0
        self.register_buffer("passes", torch.zeros(()))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, rows):
        self.passes += 1
        return self.norm(self.net(rows))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_validation_epoch_start(self):
        self.train()  # dropout as in training, by which batch norm counts too

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.best(accuracy)
        self.highest = max(self.highest, float(accuracy))
        self.log("acc", accuracy)
        self.log("best", self.best.compute())

    def scores(self):
        return float(self.best.compute()), self.highest


class AtTheEnd(pl.Callback):
    """What a module and the random numbers are when training ends, before anything is pruned."""

    def on_train_end(self, trainer, pl_module):
        self.rng, self.weights = torch.get_rng_state(), copy.deepcopy(pl_module.state_dict())
        self.scores = pl_module.scores() if isinstance(pl_module, Counting) else None


@pytest.mark.parametrize("methods", ["dare", ["darex-q", "refit"], "darex-learned"])
def test_buffers_metrics_and_numbers_are_those_of_the_end_of_training(tmp_path, methods):
    module, end = Counting(), AtTheEnd()
    settings = {"refit": {"steps": 3}} if "refit" in methods else {}
    callback = pruning(tmp_path, methods, method_settings=settings)
    trainer(callback, end).fit(module, train_loader(), val_loader())
    assert len(callback.results) == 2 + (2 if "refit" in methods else 1)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in end.weights.items())
    assert module.scores() == end.scores


def test_a_score_that_is_kept_over_evaluations_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="monitor='best' is carried from one evaluation to the next"):
        trainer(pruning(tmp_path, monitor="best")).fit(Counting(), train_loader(), val_loader())


class Noisy(Foreign):
    """Draws in its forward, as a VAE does."""

    def forward(self, rows):
        return self.net(rows) + torch.randn(len(rows), 3)

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("settings", [{}, {"forward_fn": lambda module, batch: module(batch[0])}])
def test_random_numbers_are_drawn_anew_for_each_model(tmp_path, settings):
    end, callback = AtTheEnd(), pruning(tmp_path, ["darex-q", "darex-learned"], **settings)
    trainer(callback, end).fit(Noisy(), train_loader(), val_loader())
    assert torch.equal(torch.get_rng_state(), end.rng)


class Conditioned(Foreign):
    """Its steps give it a second input, without which its forward works too."""

    def forward(self, rows, shift=None):
        return self.net(rows) if shift is None else self.net(rows) + shift[:, None] * torch.arange(3.0)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0], batch[1].float()), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0], batch[1].float()).argmax(1) == batch[1]).float().mean())


def test_a_step_that_calls_its_module_with_more_of_the_batch_needs_a_forward_fn(tmp_path):
    settings = {"method_settings": {"refit": {"steps": 3}}}
    with pytest.raises(ValueError, match="more than the first element of a batch"):
        trainer(pruning(tmp_path, "refit", **settings)).fit(Conditioned(), train_loader(), val_loader())
    settings["forward_fn"] = lambda module, batch: module(batch[0], batch[1].float())
    callback = pruning(tmp_path, "refit", **settings)
    trainer(callback).fit(Conditioned(), train_loader(), val_loader())
    assert len(callback.results) == 3


@pytest.mark.parametrize(
    ("monitor", "logged"), [("val/acc", "test/acc"), ("valid_acc", "test_acc"), ("val_acc", "val_acc"), ("acc", "acc")]
)
def test_the_test_split_s_score_goes_by_its_usual_names(tmp_path, monitor, logged):
    base = Foreign()
    torch.save(base.state_dict(), tmp_path / "base.pt")

    class Testing(Foreign):
        def test_step(self, batch, batch_idx):
            self.log(logged, (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    callback = pruning(tmp_path, monitor=monitor, pretrained=str(tmp_path / "base.pt"))
    trainer(callback).test(Testing(), val_loader(), verbose=False)
    assert [row.split for row in callback.results] == ["test"] * 3


class Attention(Foreign):
    """torch's own encoder with padding, whose fast path has nested tensors."""

    def __init__(self):
        super().__init__()
        self.cells = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
        self.first = nn.Linear(1, 8)
        self.net = nn.Linear(8, 3)

    def forward(self, rows):
        padding = torch.zeros(rows.shape, dtype=torch.bool)
        padding[:, -1] = True
        return self.net(self.cells(self.first(rows[..., None]), src_key_padding_mask=padding).mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("loss", ["model", "block"])
def test_torch_s_own_encoder_is_trained_and_its_blocks_are_those_that_are_named(tmp_path, loss):
    callback = pruning(
        tmp_path, "refit", method_settings={"refit": {"steps": 3, "loss": loss}}, blocks=["cells.layers.*"]
    )
    enabled = torch.backends.mha.get_fastpath_enabled()
    trainer(callback, max_steps=2).fit(Attention(), train_loader(), val_loader())
    assert len(callback.results) == 3
    assert torch.backends.mha.get_fastpath_enabled() is enabled
