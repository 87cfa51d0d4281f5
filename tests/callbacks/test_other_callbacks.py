"""DeltaPruneCallback beside other callbacks: none acts in the extra passes, so every row is the score of its weights."""

import copy
import json
import re
import time
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from prune_fits import callback, equal, weights
from tiny import Foreign, blobs, train_loader, trainer, val_loader
from torch.utils.data import DataLoader

from dpp_lightning import SparseDelta
from dpp_lightning.analysis.delta_cost import inspect_delta
from dpp_lightning.experiments.tables import summary_rows

DECAY = 0.9


class Swap(pl.Callback):
    """Puts weights of its own in place in one hook of an evaluation and the former ones back in another."""

    def __init__(self, start, end):
        torch.manual_seed(5)
        self.mine = weights(Foreign())
        setattr(self, start, lambda trainer, pl_module, *batch: self.swap(pl_module))
        setattr(self, end, lambda trainer, pl_module, *batch: self.swap(pl_module))

    def swap(self, module):
        before = weights(module)
        module.load_state_dict(self.mine)
        self.mine = before


class Steps(pl.Callback):
    """The weights after every step."""

    def on_train_batch_end(self, trainer, pl_module, *batch):
        self.__dict__.setdefault("weights", []).append(weights(pl_module))


def accuracy(state, samples=200):
    """By a forward pass in plain torch over the whole validation set."""
    net = copy.deepcopy(Foreign()).net
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items()})
    inputs, labels = blobs(samples, 1000).tensors
    with torch.no_grad():
        return float((net.eval()(inputs).argmax(1) == labels).float().mean())


OTHERS = {
    "none": lambda: None,
    "ema": lambda: EMAWeightAveraging(decay=DECAY),
    "average": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    "swap-start": lambda: Swap("on_validation_start", "on_validation_end"),
    "swap-epoch": lambda: Swap("on_validation_epoch_start", "on_validation_epoch_end"),
    "swap-batch": lambda: Swap("on_validation_batch_start", "on_validation_batch_end"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_every_row_is_the_score_of_its_own_weights(tmp_path, other, first):
    torch.manual_seed(0)
    module, steps = Foreign(), Steps()
    base, pruned, beside = weights(module), callback(tmp_path, method=["dare", "darex-q"]), OTHERS[other]()
    callbacks = [c for c in ([pruned, beside] if first else [beside, pruned]) if c is not None]
    trainer(steps, *callbacks, max_epochs=4).fit(module, train_loader(), val_loader())
    finetuned = weights(module)
    states = {"base": base, "fine-tuned": finetuned}
    for row in pruned.results[2:]:
        applied = {name: tensor.clone() for name, tensor in base.items()}
        SparseDelta.from_pretrained(tmp_path / row.folder).apply_(applied)
        states[row.method] = applied
    scores = {row.method: row.score for row in pruned.results}
    assert scores == {method: pytest.approx(accuracy(state), abs=1e-6) for method, state in states.items()}
    assert scores["base"] < 0.5 < scores["fine-tuned"]
    assert equal(finetuned, steps.weights[-1]) == (other not in ("ema", "average", "swa"))
    if other in ("ema", "average"):
        assert_average(finetuned, steps.weights, DECAY if other == "ema" else None)


def assert_average(state, every_step, decay):
    """The weights that are pruned are the average over the steps, with equal shares or a decay."""
    for name, tensor in state.items():
        mean = every_step[0][name].double()
        for count, step in enumerate(every_step[1:], 1):
            share = 1 / (count + 1) if decay is None else 1 - decay
            mean = mean + share * (step[name].double() - mean)
        assert torch.allclose(tensor.double(), mean, atol=1e-5)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_table_without_a_fit_is_true_beside_a_callback_that_swaps_weights(tmp_path, stage):
    class Tested(Foreign):
        def test_step(self, batch, batch_idx):
            self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    torch.manual_seed(0)
    module = Tested()
    base = weights(module)
    torch.save(base, tmp_path / "base.bin")
    trainer(max_epochs=3).fit(module, train_loader())
    pruned = callback(tmp_path / "out", pretrained=str(tmp_path / "base.bin"))
    hook = "on_validation" if stage == "validate" else "on_test"
    swap = Swap(f"{hook}_start", f"{hook}_end")
    getattr(trainer(swap, pruned), stage)(module, val_loader(), verbose=False)
    expected = [pytest.approx(accuracy(state), abs=1e-6) for state in (base, weights(module))]
    assert [row.score for row in pruned.results[:2]] == expected
    more = callback(tmp_path / "out", pretrained=str(tmp_path / "base.bin"), method=["dare", "magnitude"], resume=True)
    getattr(trainer(swap, more), stage)(module, val_loader(), verbose=False)
    assert [row.score for row in more.results[:2]] == expected
    assert [row.method for row in more.results[2:]] == ["dare", "magnitude"]


class Hooks(pl.Callback):
    """The name of every hook that is called."""

    def __init__(self):
        self.called = []
        for name in dir(pl.Callback):
            if name.startswith("on_") and name not in ("on_save_checkpoint", "on_load_checkpoint"):
                setattr(self, name, lambda *args, _name=name: self.called.append(_name))


@pytest.mark.parametrize("settings", [{}, {"num_sanity_val_steps": 0}, {"max_epochs": 1, "val_check_interval": 4}])
def test_other_callbacks_are_called_as_without_this_one(tmp_path, settings):
    called = []
    for pruning in ([], [callback(tmp_path, method=["dare", "darex-q"], seeds=[0, 1], plot=True)]):
        hooks = Hooks()
        run = trainer(hooks, *pruning, **settings)
        run.fit(Foreign(), train_loader(), val_loader())
        run.validate(Foreign(), val_loader(), verbose=False)
        called.append(hooks.called)
    assert called[0] == called[1]
    assert "on_validation_epoch_start" in called[0]


def test_a_module_finds_the_callbacks_of_its_trainer_in_an_extra_pass(tmp_path, capsys):
    class Curious(Foreign):
        def on_validation_epoch_end(self):
            found.append((self.trainer.checkpoint_callback, self.trainer.progress_bar_callback, self.trainer.callbacks))
            self.print("an epoch ends")

    found, saved, bar = [], ModelCheckpoint(tmp_path / "saved"), TQDMProgressBar()
    pruned = callback(tmp_path / "deltas")
    run = trainer(pruned, saved, bar, enable_checkpointing=True, enable_progress_bar=True)
    run.fit(Curious(), train_loader(), val_loader())
    trials = 2 + 2  # of one batch, before and after training
    assert len(found) == 1 + 2 + 3 + trials, "in the sanity check, after each epoch, for each row"
    assert all((a, b) == (saved, bar) and pruned in all_of_them for a, b, all_of_them in found)
    assert bar.is_enabled


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_callbacks_act_again_after_a_pass_that_broke_off(tmp_path, error):
    class Breaks(Foreign):
        def on_validation_epoch_start(self):
            if self.trainer.state.fn == "validate" and self.trainer.fit_loop.epoch_progress.current.completed:
                raise error

    hooks = Hooks()
    run = trainer(callback(tmp_path), hooks, max_epochs=1)
    with pytest.raises((SystemExit, error)):
        run.fit(Breaks(), train_loader(), val_loader())
    assert hooks.called[-1] == "on_exception"
    hooks.called.clear()
    run.validate(Foreign(), val_loader(), verbose=False)
    assert "on_validation_epoch_start" in hooks.called


def test_a_monitor_that_another_callback_logs_is_refused_before_training(tmp_path):
    class Logs(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("of_callback", 1.0)

        def on_train_batch_start(self, trainer, *batch):
            raise AssertionError("training began")

    run = trainer(Logs(), callback(tmp_path, monitor="of_callback"))
    with pytest.raises(
        ValueError, match=r"monitor='of_callback' was not logged.*logged were \['acc'\].*no callback acts"
    ):
        run.fit(Foreign(), train_loader(), val_loader())


class TwoLoaders(Foreign):
    """Its validation step must be told the loader."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        return super().validation_step(batch, batch_idx)


LOADERS = 200, 150


def fit_two(folder, **settings):
    pruned = callback(folder, method=["dare", "darex-q"], **settings)
    module = TwoLoaders()
    trainer(pruned).fit(module, train_loader(), [val_loader(samples) for samples in LOADERS])
    return pruned.results, weights(module)


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "metric", "calibration_dataloader": DataLoader(blobs(100, 1500), 50)}]
)
@pytest.mark.parametrize("index", [None, 0, 1])
def test_of_several_loaders_the_score_is_that_of_the_one_in_the_monitor(tmp_path, capsys, index, settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results, finetuned = fit_two(
            tmp_path, monitor="acc" if index is None else f"acc/dataloader_idx_{index}", **settings
        )
    said = [str(w.message) for w in caught if "loaders" in str(w.message) and "monitor=" in str(w.message)]
    expected = (
        "monitor='acc' is logged for 2 validation loaders: the score is acc/dataloader_idx_0, that of the first; set "
        "monitor= to acc/dataloader_idx_1 to score on another"
    )
    assert said == ([expected] if index is None else [])
    assert results[1].score == pytest.approx(accuracy(finetuned, LOADERS[index or 0]), abs=1e-6)
    name = f"acc/dataloader_idx_{index or 0}"
    assert f"score: {name} on validation" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["monitor"] for row in rows] == [name] * len(results)
    assert all(name in (tmp_path / row.folder / "README.md").read_text() for row in results[2:])


def test_a_resumed_run_that_is_complete_knows_the_loader(tmp_path, capsys):
    torch.manual_seed(0)
    module = TwoLoaders()
    torch.save(weights(module), tmp_path / "base.bin")
    trainer(max_epochs=3).fit(module, train_loader())
    for settings in ({}, {"resume": True}):
        pruned = callback(tmp_path / "out", pretrained=str(tmp_path / "base.bin"), **settings)
        with pytest.warns(UserWarning, match="2 validation loaders") if not settings else warnings.catch_warnings():
            trainer(pruned).validate(module, [val_loader(), val_loader(150)], verbose=False)
        assert "score: acc/dataloader_idx_0 on validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("monitor", "mode", "warned"),
    [
        ("val_loss", "max", "the highest val_loss for the best, though 'loss' .* low: pass mode='min'"),
        ("val/word_error_rate", "max", "pass mode='min'"),
        ("valPerplexity", "max", "pass mode='min'"),
        ("val_acc", "min", "the lowest val_acc for the best, though 'acc' .* high: pass mode='max'"),
        ("val/F1", "min", "pass mode='max'"),
        ("val_loss", "min", None),
        ("val_acc", "max", None),
        ("neg_loss", "max", None),
        ("glossary", "max", None),
        ("val_score", "min", None),
        ("accuracy_error", "max", None),
    ],
)
def test_a_mode_against_the_name_of_the_score_is_warned_of(tmp_path, monitor, mode, warned):
    class Named(Foreign):
        def validation_step(self, batch, batch_idx):
            self.log(monitor, (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    run = trainer(callback(tmp_path, monitor=monitor, mode=mode), limit_train_batches=1, limit_val_batches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Named(), train_loader(), val_loader())
    said = [str(w.message) for w in caught if str(w.message).startswith("mode=")]
    assert len(said) == bool(warned)
    assert all(re.search(warned, text) for text in said)


def test_seconds_of_base_and_finetuned_are_those_of_their_passes(tmp_path, capsys):
    class Slow(Foreign):
        def on_validation_epoch_end(self):
            if self.trainer.state.fn == "validate":
                time.sleep(0.05)

    pruned = callback(tmp_path)
    trainer(pruned).fit(Slow(), train_loader(), val_loader())
    assert all(0.05 <= row.seconds < 5 for row in pruned.results)
    assert all(float(row[-1]) >= 0.05 for row in summary_rows(pruned.results))


@pytest.mark.parametrize("save_deltas", [True, False])
def test_the_ratio_is_the_dense_models_bytes_over_the_deltas_everywhere(tmp_path, save_deltas):
    pruned = callback(tmp_path, method=["dare", "magnitude"], dtype="bfloat16", save_deltas=save_deltas)
    module = Foreign()
    trainer(pruned).fit(module, train_loader(), val_loader())
    dense = sum(tensor.numel() * 4 for tensor in module.state_dict().values())
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row, line, shown in zip(pruned.results, lines, summary_rows(pruned.results), strict=True):
        expected = None if row.method == "base" else dense / row.num_bytes
        assert row.ratio == line["ratio"] == expected
        assert shown[-2] == ("" if expected is None else f"{expected:.1f}")
        if row.folder:
            assert inspect_delta(tmp_path / row.folder).ratio == expected
            card = (tmp_path / row.folder / "README.md").read_text()
            assert f"{row.num_bytes:,}, {expected:.1f}" in card
