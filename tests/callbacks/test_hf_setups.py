"""HFDeltaPruneCallback in Trainers of many set-ups: generation, compiled models, several callbacks, loggers."""

import logging
import sys

import pytest
import torch
from tiny_hf import Texts, equal, fresh_model, make_trainer, values_of
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.callbacks import HFDeltaPruneCallback
from dpp_lightning.callbacks.prune_run import hub_upload


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("dataset", ["train", "given"])
def test_q_is_moved_by_the_data_to_what_prune_finds_on_the_same_batch(tmp_path, dataset):
    train, given = Texts(320, 1), Texts(48, 6)
    trainer = make_trainer(tmp_path, max_steps=3, train=train)
    data = {"train": None, "given": given}[dataset]
    callback = HFDeltaPruneCallback("darex-q", [0.9, 0.95], calibration_dataset=data).attach(trainer)
    trainer.train()
    items = [train[5 * i] for i in range(64)] if data is None else list(given)
    batch = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "attention_mask")}
    base, target = fresh_model(), fresh_model()
    reference = logits_of(trainer.model, batch)

    def cost(delta):
        with delta.applied(target, force=True):
            return float((logits_of(target, batch) - reference).abs().mean())

    for row in callback.results[2:]:
        found = prune(base, trainer.model, "darex-q", row.pruning_rate, 0, calibration=Calibration(cost=cost))
        assert row.q == pytest.approx(found.q, rel=1e-4)
        assert row.q > 1.5 * (1 - row.pruning_rate)


def test_labels_that_the_loss_refuses_do_not_matter_to_q(tmp_path):
    class Unlabelled(Texts):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"labels": torch.tensor(-1)}

    rows = []
    for name, data in (("with", Texts(40, 5)), ("without", Unlabelled(40, 5))):
        trainer = make_trainer(tmp_path / name, max_steps=3)
        rows.append(HFDeltaPruneCallback("darex-q", 0.9, calibration_dataset=data).attach(trainer))
        trainer.train()
    assert rows[0].results[-1].q == rows[1].results[-1].q > 0.2


def seq2seq_trainer(folder):
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, max_position_embeddings=32, **sizes))
    tokens = torch.randint(4, 32, (200, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, dtype=torch.long)
    items = [
        {"input_ids": row, "attention_mask": mask, "labels": torch.tensor([7, 9, 11, 2, *[-100] * 4])} for row in tokens
    ]
    arguments = Seq2SeqTrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, use_cpu=True, predict_with_generate=True, num_train_epochs=3,
        learning_rate=1e-2, generation_max_length=6, per_device_train_batch_size=16,
    )  # fmt: skip
    return Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=items[:160],
        eval_dataset=items[160:],
        compute_metrics=lambda p: {"sevens": float((p.predictions == 7).mean()), "width": p.predictions.shape[1]},
    )


def test_generated_predictions_are_scored(tmp_path):
    trainer = seq2seq_trainer(tmp_path / "out")
    callback = HFDeltaPruneCallback(["darex-q", "dare"], 0.5, monitor="sevens").attach(trainer)
    trainer.train()
    scores = {r.method: r.score for r in callback.results}
    assert scores["fine-tuned"] == trainer.evaluate()["eval_sevens"] > 0 == scores["base"]
    pruned = seq2seq_trainer(tmp_path / "by-hand")
    SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / "dare-p0.5-seed0").apply_(pruned.model)
    assert pruned.evaluate()["eval_sevens"] == scores["dare"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"auto_find_batch_size": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"label_smoothing_factor": 0.0, "eval_accumulation_steps": 1},
        {"eval_strategy": "no"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_change_no_weights_change_no_row(tmp_path, arguments):
    rows = []
    for name, values in (("plain", {}), ("with", arguments)):
        trainer = make_trainer(tmp_path / name, max_steps=6, **values)
        callback = HFDeltaPruneCallback(["darex-q", "darex-learned"], 0.9).attach(trainer)
        trainer.train()
        rows.append([(r.method, r.score, r.q) for r in callback.results])
        assert callback.results[1].score == trainer.evaluate()["eval_accuracy"]
    assert rows[0] == rows[1]


def test_several_callbacks_have_a_folder_each_and_their_own_metrics(tmp_path):
    trainer = make_trainer(tmp_path)
    one = HFDeltaPruneCallback("dare", output_dir=str(tmp_path / "one")).attach(trainer)
    two = HFDeltaPruneCallback("magnitude", output_dir=str(tmp_path / "two")).attach(trainer)
    trainer.train()
    assert one.results[:2] != two.results[:2]  # each scored both, at a time of its own
    assert [r.score for r in one.results[:2]] == [r.score for r in two.results[:2]]
    assert [r.method for r in one.results + two.results if r.folder] == ["dare", "magnitude"]
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("dpp/")}
    expected = {"dpp/one/dare/0.9/eval_accuracy", "dpp/two/magnitude/0.9/eval_accuracy"}
    assert logged == expected | {f"{name}_std" for name in expected}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "2 HFDeltaPruneCallbacks of this trainer would write into"),
        ({"output_dir": "other", "apply": True}, "which another HFDeltaPruneCallback of the trainer would"),
    ],
)
def test_callbacks_that_would_spoil_each_other_are_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare").attach(trainer)
    HFDeltaPruneCallback("magnitude", **settings).attach(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def without_metrics(trainer):
    trainer.compute_metrics = None


def without_data(trainer):
    trainer.eval_dataset = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_metrics, "eval_loss; give the Trainer compute_metrics, or set monitor= to one of these"),
        (without_data, "give the Trainer an eval_dataset"),
        (lambda t: setattr(t, "eval_dataset", {}), "give the Trainer an eval_dataset"),
        (
            lambda t: setattr(t, "is_fsdp_enabled", True),
            "FSDP shards them: leave it out, save the model, and take `dpp",
        ),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "DeepSpeed hides them: leave it out"),
        (
            lambda t: setattr(t, "hp_search_backend", "optuna"),
            "leave HFDeltaPruneCallback out of hyperparameter_search",
        ),
        (lambda t: t.callback_handler.callbacks[-1].attach(make_trainer_like(t)), "is attached to another Trainer"),
    ],
)
def test_a_trainer_that_cannot_do_it_is_refused_in_one_line_before_the_first_step(tmp_path, change, message):
    trainer = make_trainer(tmp_path, eval_strategy="no")
    callback = HFDeltaPruneCallback("dare").attach(trainer)

    class Changes(TrainerCallback):  # once the trainer has set itself up
        def on_train_begin(self, args, state, control, **kwargs):
            change(trainer)

    trainer.callback_handler.callbacks = [Changes(), *trainer.callback_handler.callbacks]
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        trainer.train()
    assert message in str(caught.value)
    assert trainer.state.global_step == 0
    assert callback.results == []


def make_trainer_like(trainer):
    return Trainer(trainer.model, trainer.args)


def test_wrong_settings_and_diverged_weights_name_this_callback(tmp_path):
    with pytest.raises(ValueError, match=r"^HFDeltaPruneCallback: unknown pruning method"):
        HFDeltaPruneCallback("nothing")

    class Diverged(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.classifier.weight.data.fill_(float("nan"))

    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Diverged()])
    HFDeltaPruneCallback("dare").attach(trainer)
    with pytest.warns(UserWarning, match="^HFDeltaPruneCallback did not prune"):
        trainer.train()


def test_passes_are_not_announced(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="no", log_level="info")
    HFDeltaPruneCallback("darex-q").attach(trainer)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.INFO):
        trainer.train()
        assert "Running training" in caplog.text
        assert "Running Evaluation" not in caplog.text
        trainer.evaluate()
    assert "Running Evaluation" in caplog.text


@pytest.mark.parametrize(("shown", "terminal"), [(True, True), (False, True), (True, False)])
def test_a_bar_over_the_rows_is_shown_on_a_terminal_where_the_trainer_shows_its_own(
    tmp_path, capsys, caplog, monkeypatch, shown, terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "160")
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="no", disable_tqdm=not shown)
    HFDeltaPruneCallback(["dare", "magnitude"], 0.5, seeds=[0, 1]).attach(trainer)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.train()
    bar = capsys.readouterr().err
    assert all((text in bar) is (shown and terminal) for text in ("2/3", "[3/3] magnitude p=0.5 seed=0"))
    line = "magnitude p=0.5 seed=0 q=1: eval_accuracy"
    assert (bar.count(line), caplog.text.count(line)) == ((1, 0) if shown and terminal else (0, 1))


def test_a_plot_over_q_and_an_upload(tmp_path, monkeypatch):
    uploaded = {}

    def upload(path, repo_id, *, private):
        uploaded[repo_id] = (path.name, sorted(p.name for p in path.iterdir()), private)
        return repo_id

    monkeypatch.setattr(hub_upload, "upload_folder", upload)
    monkeypatch.setattr(hub_upload, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub_upload, "get_token", lambda: "hf_token")
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback(
        "dare", [0.5, 0.9], plot=True, output_dir=str(tmp_path / "deltas"), push_to_hub="me/x", hub_private=True
    ).attach(trainer)
    before = values_of(trainer.model)
    trainer.train()
    assert (tmp_path / "deltas" / "q_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {repo: name for repo, (name, *_) in uploaded.items()} == {
        f"me/x-dare-p{rate}-seed0": f"dare-p{rate}-seed0" for rate in (0.5, 0.9)
    }
    assert all("delta_model.safetensors" in files and private is True for _, files, private in uploaded.values())
    assert not equal(before, values_of(trainer.model))


def test_an_upload_that_is_bound_to_fail_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_upload, "is_offline_mode", lambda: True)
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare", push_to_hub="me/x").attach(trainer)
    with pytest.raises(ValueError, match="push_to_hub cannot upload while the hub is offline"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_means_reach_tensorboard(tmp_path, monkeypatch):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    callback = HFDeltaPruneCallback("dare", 0.9, seeds=[0, 1]).attach(trainer)
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = event_file.EventAccumulator(str(folder)).Reload()
    (event,) = events.Scalars("train/dpp/dare/0.9/eval_accuracy")
    assert event.value == pytest.approx(sum(r.score for r in callback.results[2:]) / 2)
    assert isinstance(trainer.model, BertForSequenceClassification)
