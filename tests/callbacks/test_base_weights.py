"""Which weights are the base: those before training, of a checkpoint, in AdamR's state, after a resume, without a fit."""

import os

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from prune_fits import adamr, callback, equal, weights
from safetensors.torch import save_file
from tiny import Foreign, blobs, train_loader, trainer, val_loader
from torch.utils.data import DataLoader

from dpp_lightning import SparseDelta
from dpp_lightning.optim import AdamR


def test_the_copy_of_the_base_in_adamrs_state_is_used_and_no_second_one_made(tmp_path):
    module, pruned = Foreign(optimizer=adamr), callback(tmp_path)

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            held = {id(s["pretrained"]) for s in trainer.optimizers[0].state.values()}
            assert {id(t) for t in pruned._base.tensors.values()} == held

    trainer(pruned, Look(), max_epochs=1).fit(module, train_loader(100), val_loader())


def test_a_head_that_the_named_base_lacks_is_carried(tmp_path):
    module = Foreign()
    body = {name.removeprefix("net."): t for name, t in weights(module).items() if not name.startswith("net.5")}
    save_file(body, tmp_path / "body.safetensors")
    pruned = callback(tmp_path / "d", pretrained=str(tmp_path / "body.safetensors"))
    trainer(pruned).fit(module, train_loader(), val_loader())
    delta = SparseDelta.from_pretrained(tmp_path / "d" / "dare-p0.9-seed0")
    assert set(delta.carried) == {"5.weight", "5.bias"}
    assert torch.equal(delta.carried["5.weight"], module.net[5].weight)


def apply_delta(folder, base):
    """Apply a saved delta to a base given by its weights; another base than the delta's own is refused."""
    module = Foreign()
    module.load_state_dict(base)
    delta = SparseDelta.from_pretrained(folder)
    delta.apply_(module)
    return delta


def fit_and_resume(tmp_path, rebuild, optimizer=adamr, **settings):
    """Fit one epoch, and a second one in a new Trainer from the checkpoint.

    Args:
        tmp_path: deltas of the second fit go to its folder ``b``.
        rebuild: the base's weights to the module that the second fit begins with.
        optimizer: of the first fit.
        settings: of the second fit's callback.

    Returns:
        The second callback, and the weights that the first fit began with.
    """
    torch.manual_seed(0)
    module = Foreign(optimizer=optimizer)
    base = weights(module)
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    first, second = callback(tmp_path / "a"), callback(tmp_path / "b", pruning_rate=0.5, **settings)
    trainer(first, saved, max_epochs=1, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    trainer(second, max_epochs=2).fit(rebuild(base), train_loader(), val_loader(), ckpt_path=saved.last_model_path)
    return second, base


@pytest.mark.parametrize("optimizer", [None, adamr])
def test_resume_keeps_the_original_base(tmp_path, optimizer):
    def rebuild(base):
        module = Foreign(optimizer=optimizer)
        module.load_state_dict(base)
        return module

    second, base = fit_and_resume(tmp_path, rebuild, optimizer)
    apply_delta(tmp_path / "b" / "dare-p0.5-seed0", base)
    assert second.results[1].score > 0.7


def test_adamr_finds_the_original_base_in_the_checkpoint_even_if_the_module_was_built_otherwise(tmp_path):
    _, base = fit_and_resume(tmp_path, lambda base: Foreign(optimizer=adamr))
    apply_delta(tmp_path / "b" / "dare-p0.5-seed0", base)


def test_resume_from_another_base_is_refused_and_pretrained_cures_it(tmp_path):
    with pytest.raises(ValueError, match="not the one the checkpoint's training started from"):
        fit_and_resume(tmp_path, lambda base: Foreign(), None)
    torch.manual_seed(0)
    save_file(weights(Foreign()), tmp_path / "base.safetensors")
    named = {"pretrained": str(tmp_path / "base.safetensors")}
    _, base = fit_and_resume(tmp_path / "cured", lambda base: Foreign(), None, **named)
    apply_delta(tmp_path / "cured" / "b" / "dare-p0.5-seed0", base)


class Late(Foreign):
    """Has no weights before configure_model."""

    def __init__(self, optimizer):
        super().__init__(optimizer=optimizer)
        self.__dict__["layers"] = self._modules.pop("net")  # out of sight of the module

    def configure_model(self):
        self.net = self.layers


@pytest.mark.parametrize("optimizer", [None, adamr])
def test_modules_with_configure_model(tmp_path, optimizer):
    torch.manual_seed(0)
    first, resumed = callback(tmp_path / "a"), callback(tmp_path / "b")
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    trainer(first, saved, enable_checkpointing=True, max_epochs=1).fit(Late(optimizer), train_loader(), val_loader())
    assert first.results[0].score < first.results[1].score
    run = trainer(resumed, max_epochs=2)
    if optimizer is None:
        with pytest.raises(ValueError, match=r"restored before they could be seen.*pretrained="):
            run.fit(Late(optimizer), train_loader(), val_loader(), ckpt_path=saved.last_model_path)
    else:
        run.fit(Late(optimizer), train_loader(), val_loader(), ckpt_path=saved.last_model_path)
        assert resumed.state_dict() == first.state_dict() != {"base_fingerprint": None}


def test_validate_gives_the_same_table_without_training(tmp_path):
    torch.manual_seed(0)
    module = Foreign()
    base = weights(module)
    saved = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    settings = {"method": ["dare", "darex-q"], "pruning_rate": [0.5, 0.9], "seeds": [0, 1]}
    settings["calibration_dataloader"] = DataLoader(blobs(64, 1500), 64)
    in_fit, in_validate = callback(tmp_path / "a", **settings), callback(tmp_path / "b", **settings)
    trainer(in_fit, saved, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    restored = Foreign()
    restored.load_state_dict(base)
    scores = trainer(in_validate).validate(restored, val_loader(), ckpt_path=saved.last_model_path, verbose=False)
    assert scores[0]["acc"] == pytest.approx(in_validate.results[1].score, abs=1e-6)
    assert restored.training
    tables = [[(r.method, r.score, r.q, r.num_bytes) for r in c.results] for c in (in_fit, in_validate)]
    assert tables[0] == tables[1]
    assert equal(weights(restored), weights(module))


def test_validate_and_test_after_fit_do_not_prune_again_and_without_a_base_warn(tmp_path):
    class Tested(Foreign):
        def test_step(self, batch, batch_idx):
            self.log("test_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    pruned, module = callback(tmp_path), Tested()
    run = trainer(pruned)
    run.fit(module, train_loader(), val_loader())
    before = os.stat(tmp_path / "results.jsonl").st_mtime_ns
    run.validate(module, val_loader(), verbose=False)
    run.test(module, val_loader(), verbose=False)
    assert os.stat(tmp_path / "results.jsonl").st_mtime_ns == before
    with pytest.warns(UserWarning, match="did not prune"):
        trainer(callback(tmp_path / "w")).validate(module, val_loader(), verbose=False)


def test_a_second_fit_starts_afresh(tmp_path):
    pruned, second_module = callback(tmp_path), Foreign()
    trainer(pruned, max_epochs=1).fit(Foreign(), train_loader(100), val_loader())
    base = weights(second_module)
    trainer(pruned, max_epochs=1).fit(second_module, train_loader(100), val_loader())
    apply_delta(tmp_path / "dare-p0.9-seed0", base)
    assert len(pruned.results) == 3


def test_late_unfreezing_and_several_optimizers(tmp_path):
    class Two(Foreign):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return AdamR(self.net[:3].parameters(), lr=3e-3), torch.optim.Adam(self.net[3:].parameters(), lr=3e-3)

    torch.manual_seed(0)
    module = Two()
    base, pruned = weights(module), callback(tmp_path, pruning_rate=0.5)
    trainer(pruned, max_epochs=3).fit(module, train_loader(), val_loader())
    delta = apply_delta(tmp_path / "dare-p0.5-seed0", base)
    assert "0.weight" in delta.tensors
    assert pruned.results[1].score > 0.7
