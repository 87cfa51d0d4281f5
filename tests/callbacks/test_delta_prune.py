"""DeltaPruneCallback on a LightningModule of a user: refusals, exact weights, scores, metrics, what an error leaves."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from prune_fits import Spy, adamr, callback, equal, weights
from tiny import Foreign, blobs, train_loader, trainer, val_loader
from torch.utils.data import DataLoader

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback


def test_a_methods_own_settings_and_integers_reach_the_deltas(tmp_path):
    settings = {"magnitude": {"budget": "model"}}
    pruned = callback(tmp_path, method=["magnitude", "dare"], dtype="int8", method_settings=settings)
    trainer(pruned).fit(Foreign(), train_loader(), val_loader())
    ranked, drawn = (SparseDelta.from_pretrained(tmp_path / f"{name}-p0.9-seed0") for name in ("magnitude", "dare"))
    assert (ranked.info.settings, drawn.info.settings) == ({"budget": "model"}, {})
    assert ranked.info.dtype == drawn.info.dtype == "int8"
    shares = {round(t.values.numel() / t.indices.new_empty(t.shape).numel(), 2) for t in ranked.tensors.values()}
    assert len(shares) > 1, "one budget for the model leaves more of one tensor than of another"


@pytest.mark.parametrize("optimizer", [None, adamr])
def test_every_row_is_the_score_of_the_saved_delta_and_the_weights_come_back(tmp_path, optimizer):
    torch.manual_seed(0)
    module = Foreign(optimizer=optimizer)
    base, spy = weights(module), Spy()
    pruned = callback(
        tmp_path,
        method=["dare", "darex-q", "random-drop", "importance", "magnitude"],
        pruning_rate=[0.5, 0.9],
        seeds=[0, 1],
        plot=True,
    )
    run = trainer(pruned, spy, logger=CSVLogger(tmp_path / "logs"))
    run.fit(module, train_loader(), val_loader())
    assert equal(weights(module), spy.weights)
    assert spy.training
    assert module.training
    assert run.state.fn == "fit"
    states = [s["pretrained"] for s in run.optimizers[0].state.values() if "pretrained" in s]
    assert all(torch.equal(a, b) for a, b in zip(states, spy.theta0, strict=True))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in rows[:2]] == ["base", "fine-tuned"]
    assert len(rows) == 2 + 4 * 2 * 2 + 2, "magnitude draws nothing, so one seed is enough"
    fresh, scorer = Foreign(), trainer()
    reference = {row["method"]: row["score"] for row in rows[:2]}
    for row in rows:
        if row["folder"]:
            fresh.load_state_dict(base)
            SparseDelta.from_pretrained(tmp_path / row["folder"]).apply_(fresh)
            size = sum(
                (tmp_path / row["folder"] / f).stat().st_size for f in ("delta_model.safetensors", "delta_config.json")
            )
            assert row["num_bytes"] == size
            card = (tmp_path / row["folder"] / "README.md").read_text()
            assert all(f"| {name} | {score:.6g} |" in card for name, score in reference.items())
        else:
            fresh.load_state_dict(base if row["method"] == "base" else spy.weights)
        assert scorer.validate(fresh, val_loader(), verbose=False)[0]["acc"] == pytest.approx(row["score"], abs=1e-6)
    assert rows[0]["score"] < 0.6 < 0.8 < rows[1]["score"]
    for rate in (0.5, 0.9):
        qs = {m: {r["q"] for r in rows if r["method"] == m and r["pruning_rate"] == rate} for m in ("dare", "darex-q")}
        assert list(qs["dare"]) == [pytest.approx(1 - rate)]
        assert len(qs["darex-q"]) == 1  # found once, on the first seed's mask
    assert all(r["forwards"] <= 14 for r in rows)
    assert (tmp_path / "q_curve.png").stat().st_size > 10_000
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    assert metrics["acc"] == pytest.approx(rows[1]["score"], abs=1e-6)  # of the fine-tuned model, as training left it
    scores = torch.tensor([r["score"] for r in rows if r["method"] == "dare" and r["pruning_rate"] == 0.9])
    assert metrics["dpp/dare/0.9/acc"] == pytest.approx(float(scores.mean()))
    assert metrics["dpp/dare/0.9/acc_std"] == pytest.approx(float(scores.std()))
    logged = (tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "dpp/darex-q/0.5/acc_std" in logged


def test_loggers_checkpoints_and_stopping_do_not_notice_the_extra_passes(tmp_path):
    calls = []

    class Noisy(CSVLogger):
        def log_metrics(self, metrics, step=None):
            calls.append(dict(metrics))
            super().log_metrics(metrics, step)

    logger = Noisy(tmp_path / "logs")
    best = ModelCheckpoint(tmp_path / "ck", monitor="acc", mode="max", save_last=True)
    stop = EarlyStopping("acc", patience=50, mode="max")
    module = Foreign()
    spy = Spy()
    run = trainer(callback(tmp_path / "d"), best, stop, spy, logger=logger, enable_checkpointing=True)
    run.fit(module, train_loader(), val_loader())
    assert sum("acc" in call for call in calls) == 2  # one a training epoch, none of a pruned model
    assert sum(any(k.startswith("dpp/") for k in call) for call in calls) == 1
    saved = torch.load(best.last_model_path, weights_only=True)["state_dict"]
    assert equal(saved, spy.weights)
    assert stop.best_score == best.best_model_score


def test_prunes_the_averaged_weights_and_acts_after_all_others(tmp_path):
    pruned = callback(tmp_path)
    seen = {}

    class Last(Spy):
        def on_train_end(self, trainer, pl_module):
            seen["callbacks"] = [type(c).__name__ for c in trainer.callbacks]

    run = trainer(pruned, WeightAveraging(), Last(), ModelCheckpoint(tmp_path / "ck"), enable_checkpointing=True)
    module = Foreign()
    run.fit(module, train_loader(), val_loader())
    assert seen["callbacks"][-1] == "DeltaPruneCallback"
    row = next(r for r in pruned.results if r.method == "fine-tuned")
    assert trainer().validate(module, val_loader(), verbose=False)[0]["acc"] == pytest.approx(row.score, abs=1e-6)


def test_training_is_the_same_with_and_without_the_callback(tmp_path):
    results = []
    for callbacks in ([], [callback(tmp_path, method=["dare", "darex-q"])]):
        torch.manual_seed(0)
        module = Foreign(dropout=0.2)
        run = trainer(*callbacks)
        run.fit(module, train_loader(), val_loader())
        results.append((weights(module), torch.rand(1).item()))
    assert equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_apply_leaves_the_pruned_model(tmp_path):
    module = Foreign(optimizer=adamr)
    base = weights(module)
    pruned = callback(tmp_path, apply=True, pruning_rate=0.8)
    trainer(pruned).fit(module, train_loader(), val_loader())
    fresh = Foreign()
    fresh.load_state_dict(base)
    SparseDelta.from_pretrained(tmp_path / "dare-p0.8-seed0").apply_(fresh)
    assert equal(weights(fresh), weights(module))


def test_prunes_the_best_checkpoint_on_request(tmp_path):
    best = ModelCheckpoint(
        tmp_path / "ck", monitor="acc", mode="min", save_top_k=1
    )  # the worst epoch, surely not the last
    pruned, spy, module = callback(tmp_path / "d", ckpt="best"), Spy(), Foreign()
    trainer(pruned, best, spy, enable_checkpointing=True, max_epochs=3).fit(module, train_loader(), val_loader())
    assert pruned.results[1].score == pytest.approx(float(best.best_model_score), abs=1e-6)
    assert equal(weights(module), spy.weights)


def test_best_without_a_checkpoint_callback_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="ModelCheckpoint"):
        trainer(callback(tmp_path, ckpt="best")).fit(Foreign(), train_loader(), val_loader())


def test_several_validation_loaders_and_limits(tmp_path):
    class Two(Foreign):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return super().validation_step(batch, batch_idx)

    pruned = callback(tmp_path, method="darex-q")
    run = trainer(pruned, limit_val_batches=1, accumulate_grad_batches=2)
    run.fit(Two(), train_loader(), [val_loader(), val_loader()])
    assert len(pruned.results) == 3
    assert run.limit_val_batches == 1


class WithCalibration(pl.LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def val_dataloader(self):
        return val_loader()

    def calibration_dataloader(self):
        return DataLoader(blobs(100, 1500), 50)


def test_q_by_metric_reads_held_out_labels_and_says_so(tmp_path):
    pruned = callback(tmp_path, method="darex-q", objective="metric", pruning_rate=0.9)
    trainer(pruned).fit(Foreign(), datamodule=WithCalibration())
    assert pruned.results[-1].q_split == "calibration split"
    assert pruned.results[-1].split == "validation"
    assert 0.1 <= pruned.results[-1].q <= 1
    with pytest.raises(ValueError, match="neither trained on nor is scored"):
        trainer(callback(tmp_path, objective="metric")).fit(Foreign(), train_loader(), val_loader())


def test_forward_fn_and_output_layer(tmp_path):
    pruned = callback(tmp_path, method="darex-q", forward_fn=lambda module, batch: module.net(batch[0]))
    trainer(pruned).fit(Foreign(), train_loader(), val_loader())
    named = callback(tmp_path, method="darex-q", output_layer="net.5")
    torch.manual_seed(0)
    trainer(named).fit(Foreign(), train_loader(), val_loader())
    assert {pruned.results[-1].q_split, named.results[-1].q_split} == {"64 items of train"}
    with pytest.raises(ValueError, match="attribute output_layer"):
        trainer(callback(tmp_path, output_layer="last_hidden")).fit(Foreign(), train_loader(), val_loader())
    module = Foreign()
    module.output_layer = "net.3"
    hidden = callback(tmp_path, method="darex-q", output_layer="last_hidden")
    trainer(hidden).fit(module, train_loader(), val_loader())
    assert hidden.settings.output_layer_of(module) == "net.3"
    with pytest.raises(ValueError, match="no submodule"):
        trainer(callback(tmp_path, output_layer="head")).fit(Foreign(), train_loader(), val_loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruning_rate": 1.0}, r"\[0, 1\)"),
        ({"pruning_rate": [0.5, -0.1]}, r"\[0, 1\)"),
        ({"method": "dares"}, "did you mean 'dare'"),
        ({"method": []}, "at least one"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"seeds": -1}, "mask seed"),
        ({"mode": "best"}, "mode must be"),
        ({"objective": "labels"}, "objective must be"),
        ({"dtype": "int5"}, "dtype must be"),
        ({"method": "importance", "dtype": "int4"}, "importance weighs the kept values"),
        ({"method_settings": {"magnitude": {"budget": "model"}}}, "not among the methods"),
        ({"method": "magnitude", "method_settings": {"magnitude": {"budget": "layer"}}}, "budget must be one of"),
        ({"method_settings": {"dare": {"budget": "model"}}}, "unknown method setting"),
        ({"calibration_samples": 0}, "calibration_samples"),
        ({"apply": True, "seeds": [0, 1]}, "apply=True"),
        ({"scope": "mlp"}, "scope must be"),
    ],
)
def test_bad_settings_are_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        callback(tmp_path, **settings)


def test_all_faults_of_the_settings_are_in_one_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"did you mean 'dare'.*\[0, 1\).*mode must be.*none twice.*calibration_samples"
    ):
        callback(tmp_path, method="dares", pruning_rate=1, mode="best", seeds=[0, 0], calibration_samples=0)


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_monitor_that_is_not_logged_is_refused_before_training(tmp_path, sanity_steps):
    module = Foreign()
    before = weights(module)
    with pytest.raises(ValueError, match=r"'accuracy' was not logged.*'acc'"):
        trainer(callback(tmp_path, monitor="accuracy"), num_sanity_val_steps=sanity_steps).fit(
            module, train_loader(), val_loader()
        )
    assert equal(weights(module), before)


def test_missing_validation_and_unwritable_folders_are_refused_before_training(tmp_path):
    module = Foreign()
    before = weights(module)
    with pytest.raises(ValueError, match="validation loop"):
        trainer(callback(tmp_path)).fit(module, train_loader())
    with pytest.raises(ValueError, match="validation loop"):
        trainer(callback(tmp_path), limit_val_batches=0).fit(module, train_loader(), val_loader())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot write into"):
        trainer(callback(tmp_path / "file" / "deltas")).fit(module, train_loader(), val_loader())
    with pytest.raises(ValueError, match="matches none"):
        trainer(callback(tmp_path, carry=["classifier.*"])).fit(module, train_loader(), val_loader())
    assert equal(weights(module), before)


def test_an_interrupted_fit_says_what_was_not_done_and_leaves_no_delta(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="no delta was pruned"), pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(callback(tmp_path / "d"), Interrupt()).fit(Foreign(), train_loader(), val_loader())
    assert not (tmp_path / "d").exists()


def test_an_interrupt_while_pruning_keeps_the_finished_deltas_and_the_finetuned_weights(tmp_path):
    passes = []

    class Impatient(Foreign):
        def on_validation_epoch_end(self):
            passes.append(self.trainer.current_epoch)
            # after one pass and two of one batch before training, two epochs, two of one batch again, fine-tuned, base
            # and the first pruned model
            if len(passes) == 11:
                raise KeyboardInterrupt

    module, spy = Impatient(), Spy()
    run = trainer(callback(tmp_path, seeds=[0, 1, 2]), spy, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="pruning was stopped"), pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(module, train_loader(), val_loader())
    assert equal(weights(module), spy.weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dare-p0.9-seed0", "results.jsonl"]


def test_an_error_in_the_extra_passes_leaves_the_finetuned_weights(tmp_path):
    passes = []

    class Fragile(Foreign):
        def on_validation_epoch_end(self):
            passes.append(self.trainer.current_epoch)
            if len(passes) == 10:
                raise RuntimeError("out of memory")

    module, spy = Fragile(), Spy()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(callback(tmp_path, seeds=[0, 1, 2]), spy, num_sanity_val_steps=0).fit(
            module, train_loader(), val_loader()
        )
    assert equal(weights(module), spy.weights)


def test_what_is_carried_and_did_not_change_is_not_said_to_be_stored(tmp_path, caplog):
    module = Foreign()
    module.net[0].requires_grad_(False)
    prune = DeltaPruneCallback("dare", 0.5, monitor="acc", output_dir=str(tmp_path / "deltas"), carry=["0.*", "3.*"])
    with caplog.at_level("INFO"):
        trainer(prune).fit(module, train_loader(), val_loader())
    (said,) = [record.message for record in caplog.records if "stored dense" in record.message]
    assert said == f"stored dense in every delta, {(64 * 64 + 64) * 4:,} bytes: 3.weight, 3.bias"
