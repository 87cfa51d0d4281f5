"""``ckpt="best"``: the weights that Lightning loads from the best checkpoint are pruned, and the last ones come back."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from prune_fits import callback
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning import SparseDelta

AMSGRAD = partial(torch.optim.Adam, amsgrad=True)


class Spoiled(Foreign):
    """Trains well, and is spoiled before the last step."""

    spoiled_with = 1.0

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 37:
            with torch.no_grad():
                self.net[3].weight.add_(self.spoiled_with * torch.randn_like(self.net[3].weight))


class Partial(Spoiled):
    """Saves and restores only what is trained, as modules with a frozen backbone do."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.strict_loading = False

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def state_dict(self, *args, **kwargs):
        return {n: t for n, t in super().state_dict(*args, **kwargs).items() if not n.startswith("net.0.")}


class Compiled(Spoiled):
    """Its checkpoints have the names of a compiled module, which its ``on_load_checkpoint`` strips."""

    def on_save_checkpoint(self, checkpoint):
        names = {n: n.replace("net.", "net._orig_mod.") for n in checkpoint["state_dict"]}
        checkpoint["state_dict"] = {names[n]: t for n, t in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {n.replace("_orig_mod.", ""): t for n, t in checkpoint["state_dict"].items()}


class Configured(Spoiled):
    def __init__(self):
        super().__init__()
        self.made, self.net = self.net, None

    def configure_model(self):
        if self.net is None:
            self.net, self.made = self.made, None


class Hyper(Spoiled):
    """Keeps a hyperparameter that only a full unpickling reads."""

    def __init__(self, optimizer=AMSGRAD):
        super().__init__(optimizer=optimizer)
        self.save_hyperparameters()


class Extra(Spoiled):
    """Has a state beside its tensors."""

    epochs = 0

    def on_train_epoch_end(self):
        self.epochs += 1

    def get_extra_state(self):
        return {"epochs": self.epochs}

    def set_extra_state(self, state):
        self.epochs = state["epochs"]


class Last(pl.Callback):
    """All tensors at the end of training, before pruning."""

    def on_train_end(self, trainer, pl_module):
        self.tensors = tensors(pl_module)


def tensors(module):
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n].nan_to_num(7.0), b[n].nan_to_num(7.0)) and a[n].isnan().sum() == b[n].isnan().sum() for n in a
    )


def checkpoints(folder, **settings):
    return ModelCheckpoint(**{"dirpath": str(folder / "ckpt"), "monitor": "acc", "mode": "max", **settings})


@pytest.mark.parametrize("make", [Spoiled, Partial, Compiled, Configured, Hyper, Extra])
def test_the_best_weights_are_pruned_as_lightning_loads_them_and_the_last_come_back(tmp_path, make):
    torch.manual_seed(0)
    module, last, kept = make(), Last(), checkpoints(tmp_path)
    base = {name.replace("made.", "net."): tensor for name, tensor in tensors(module).items()}
    pruned = callback(tmp_path / "out", ckpt="best", pruning_rate=0.0, dtype="float32")
    trainer(pruned, kept, last, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    assert kept.best_model_path.endswith("epoch=0-step=19.ckpt")
    assert pruned.results[1].score == pytest.approx(float(kept.best_model_score), abs=1e-6)
    assert pruned.results[2].score == pytest.approx(float(kept.best_model_score), abs=1e-6)
    assert same(tensors(module), last.tensors)
    assert getattr(module, "epochs", 2) == 2
    saved = torch.load(kept.best_model_path, weights_only=False)["state_dict"]
    saved = {name.replace("_orig_mod.", "").removeprefix("net."): tensor for name, tensor in saved.items()}
    delta = SparseDelta.from_pretrained(tmp_path / "out" / "dare-p0-seed0")
    pruned_tensor, trained = delta.tensors["3.weight"], saved["3.weight"].flatten()
    moved = (trained - base["net.3.weight"].flatten())[pruned_tensor.indices.long()]
    assert pruned_tensor.values.numel() > 4000
    assert torch.allclose(pruned_tensor.values, moved, atol=1e-6)
    assert not torch.allclose(trained, last.tensors["net.3.weight"].flatten(), atol=0.1)


def test_beside_an_average_the_best_weights_are_the_averaged_ones_that_were_scored(tmp_path):
    torch.manual_seed(0)
    module, kept, last = Spoiled(), checkpoints(tmp_path), Last()
    average = EMAWeightAveraging(decay=0.9)
    pruned = callback(tmp_path / "out", ckpt="best", pruning_rate=0.0, dtype="float32")
    run = trainer(average, pruned, kept, last, enable_checkpointing=True)
    run.fit(module, train_loader(), val_loader())
    loaded = Foreign()
    loaded.load_state_dict(torch.load(kept.best_model_path, weights_only=False)["state_dict"])
    by_hand = trainer().validate(loaded, val_loader(), verbose=False)[0]["acc"]
    assert pruned.results[1].score == pytest.approx(by_hand, abs=1e-6)
    assert pruned.results[1].score == pytest.approx(float(kept.best_model_score), abs=1e-6)
    assert same(tensors(module), last.tensors)


def test_a_lora_module_that_saves_only_its_adapter_prunes_its_best(tmp_path):
    peft = pytest.importorskip("peft")

    class Adapted(Spoiled):
        def __init__(self):
            super().__init__(learning_rate=3e-2)
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "3", "5"])
            self.net, self.strict_loading = peft.get_peft_model(self.net, config), False

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 37:
                for name, parameter in self.net.named_parameters():
                    if "lora" in name:
                        parameter.data.add_(torch.randn_like(parameter))

        def state_dict(self, *args, **kwargs):
            return {n: t for n, t in super().state_dict(*args, **kwargs).items() if "lora_" in n}

    torch.manual_seed(0)
    module, kept, last = Adapted(), checkpoints(tmp_path), Last()
    pruned = callback(tmp_path / "out", ckpt="best", pruning_rate=0.0, dtype="float32")
    trainer(pruned, kept, last, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    assert pruned.results[1].score == pytest.approx(float(kept.best_model_score), abs=1e-6)
    assert same(tensors(module), last.tensors)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"monitor": None}, r"found ModelCheckpoint\(monitor=None, save_top_k=1\)"),
        ({"save_top_k": 0}, r"found ModelCheckpoint\(monitor='acc', save_top_k=0\)"),
    ],
)
def test_no_best_checkpoint_to_come_is_refused_before_training(tmp_path, settings, said):
    run = trainer(callback(tmp_path, ckpt="best"), checkpoints(tmp_path, **settings), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"ckpt='best' needs a ModelCheckpoint\(monitor=.*" + said):
        run.fit(Foreign(), train_loader(), val_loader())
    assert run.global_step == 0


def test_of_several_checkpoints_the_one_that_keeps_the_best_is_taken(tmp_path):
    torch.manual_seed(0)
    latest = ModelCheckpoint(dirpath=str(tmp_path / "latest"))
    best = checkpoints(tmp_path)
    pruned = callback(tmp_path / "out", ckpt="best")
    trainer(latest, best, pruned, enable_checkpointing=True).fit(Spoiled(), train_loader(), val_loader())
    assert pruned.results[1].score == pytest.approx(float(best.best_model_score), abs=1e-6)
    others = trainer(best, checkpoints(tmp_path, monitor="other"), pruned, enable_checkpointing=True, max_steps=1)
    with pytest.warns(UserWarning, match="the best acc of the first of 2 ModelCheckpoints; the others monitor other"):
        others.fit(Spoiled(), train_loader(), val_loader())


def test_a_state_dict_that_cannot_be_loaded_is_refused_before_training(tmp_path):
    module = Partial()
    module.strict_loading = True
    run = trainer(callback(tmp_path, ckpt="best"), checkpoints(tmp_path), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"leaves out 2 of 6 parameters .*set its strict_loading=False"):
        run.fit(module, train_loader(), val_loader())
    assert run.global_step == 0


def test_a_fit_in_which_no_checkpoint_was_kept_ends_with_a_line_that_says_so(tmp_path):
    pruned = callback(tmp_path, ckpt="best")
    run = trainer(pruned, checkpoints(tmp_path, every_n_epochs=5), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="did not prune: ckpt='best', and .* kept no checkpoint in 38 steps"):
        run.fit(Foreign(), train_loader(), val_loader())
    assert run.state.finished
    assert pruned.results == []


def test_a_finite_best_is_pruned_though_the_last_weights_are_nan(tmp_path):
    torch.manual_seed(0)
    module, last, kept = Spoiled(), Last(), checkpoints(tmp_path)
    module.spoiled_with = float("nan")
    stop = EarlyStopping("acc", mode="max", check_finite=True)
    pruned = callback(tmp_path / "out", ckpt="best", method="darex-q")
    run = trainer(pruned, kept, stop, last, enable_checkpointing=True)
    run.fit(module, train_loader(), val_loader())
    assert run.state.finished
    assert len(pruned.results) == 3
    assert pruned.results[1].score == pytest.approx(float(kept.best_model_score), abs=1e-6)
    assert int(module.net[3].weight.isnan().sum()) == 64 * 64
    assert same(tensors(module), last.tensors)
