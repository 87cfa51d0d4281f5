"""HFDeltaPruneCallback in a Trainer of transformers: deltas, scores, and what it leaves as it was."""

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny_hf import Texts, equal, fresh_model, make_trainer, rows_in, values_of
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.callbacks import HFDeltaPruneCallback
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint


def test_deltas_are_those_of_prune_and_scores_those_of_evaluate(tmp_path):
    model = fresh_model()
    base = deepcopy(model)
    trainer = make_trainer(tmp_path, model)
    callback = HFDeltaPruneCallback(["dare", "magnitude"], [0.5, 0.9], seeds=[0, 1], monitor="accuracy").attach(trainer)
    trainer.train()
    rows = rows_in(tmp_path / "out" / "deltas")
    assert [row["method"] for row in rows[:2]] == ["base", "fine-tuned"]
    assert rows[1]["score"] == trainer.evaluate()["eval_accuracy"] > rows[0]["score"]
    assert [r.score for r in callback.results] == [r["score"] for r in rows]
    assert len(rows) == 2 + 4 + 2  # magnitude draws nothing
    for row in rows[2:]:
        saved = SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / row["folder"])
        expected = prune(base, model, row["method"], row["pruning_rate"], row["seed"])
        target, by_hand = deepcopy(base), deepcopy(base)
        saved.apply_(target)
        expected.apply_(by_hand)
        assert equal(values_of(target), values_of(by_hand))
        scored = make_trainer(tmp_path / "scored", target)
        assert scored.evaluate()["eval_accuracy"] == row["score"]


@pytest.mark.parametrize("apply", [False, True])
def test_the_model_holds_the_weights_of_a_training_without_it(tmp_path, apply):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    with_it = make_trainer(tmp_path / "with")
    HFDeltaPruneCallback("darex-q", 0.9, apply=apply).attach(with_it)
    with_it.train()
    if not apply:
        assert equal(values_of(plain.model), values_of(with_it.model))
        return
    pruned = fresh_model()
    SparseDelta.from_pretrained(tmp_path / "with" / "out" / "deltas" / "darex-q-p0.9-seed0").apply_(pruned)
    assert equal(values_of(pruned), values_of(with_it.model))


class Watcher(TrainerCallback):
    """Notes every event; swaps weights away in evaluations, as an average would."""

    def __init__(self):
        self.events = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append("evaluate")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.events.append("step")
        control.should_training_stop = True

    def on_log(self, args, state, control, logs, **kwargs):
        self.events.append(tuple(logs))


def test_no_callback_acts_in_the_passes_and_the_state_is_kept(tmp_path):
    watcher = Watcher()
    trainer = make_trainer(tmp_path, callbacks=[watcher, EarlyStoppingCallback(1)], num_train_epochs=1,
                           load_best_model_at_end=True, save_strategy="epoch", metric_for_best_model="accuracy")  # fmt: skip
    callback = HFDeltaPruneCallback("dare", 0.9, seeds=[0, 1, 2]).attach(trainer)
    seen = {}

    class Before(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.update(state=deepcopy(state), events=list(watcher.events), random=random.getstate())
            seen.update(torch=torch.get_rng_state(), numpy=np.random.get_state()[1].copy(), control=deepcopy(control))

    trainer.add_callback(Before())  # after it in the list, before it in the order of the end
    trainer.train()
    assert len(callback.results) == 5
    assert watcher.events.count("evaluate") == 1
    assert watcher.events.count("step") == 3  # 96 items in batches of 32, once
    logged = watcher.events[len(seen["events"]) :]
    assert logged == [("dpp/dare/0.9/eval_accuracy", "dpp/dare/0.9/eval_accuracy_std", "epoch")]
    assert trainer.state.log_history[:-1] == seen["state"].log_history
    for name in ("best_metric", "best_global_step", "best_model_checkpoint", "global_step", "epoch"):
        assert getattr(trainer.state, name) == getattr(seen["state"], name), name
    assert random.getstate() == seen["random"]
    assert torch.equal(torch.get_rng_state(), seen["torch"])
    assert (np.random.get_state()[1] == seen["numpy"]).all()


def test_the_best_models_weights_are_pruned(tmp_path):
    class Worse(Trainer):
        """From the second epoch on the score is 0."""

        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            if self.state.epoch and self.state.epoch > 1.5 and self.control is self.real_control:
                metrics["eval_accuracy"] = 0.0
            return metrics

    model = fresh_model()
    base = deepcopy(model)
    trainer = make_trainer(tmp_path, model, trainer_class=Worse, load_best_model_at_end=True, save_strategy="epoch",
                           metric_for_best_model="accuracy")  # fmt: skip
    trainer.real_control = trainer.control
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train()
    assert trainer.state.best_global_step == 10
    best = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    pruned, by_hand = deepcopy(base), deepcopy(base)
    SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / "dare-p0.5-seed0").apply_(pruned)
    prune(base, best, "dare", 0.5, 0).apply_(by_hand)
    assert equal(values_of(pruned), values_of(by_hand))


def test_a_delta_on_the_base_folder_is_the_pruned_model_with_its_tokenizer(tmp_path):
    model = fresh_model()
    model.save_pretrained(tmp_path / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(19))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    trainer = make_trainer(tmp_path, model)
    trainer.processing_class = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    callback = HFDeltaPruneCallback("dare", 0.5, pretrained=str(tmp_path / "base"), apply=True).attach(trainer)
    trainer.train()
    folder = tmp_path / "out" / "deltas" / "dare-p0.5-seed0"
    apply_checkpoint(tmp_path / "base", folder, tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert equal(values_of(dense), values_of(trainer.model))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "dense")
    assert tokenizer("w3 w4")["input_ids"] == trainer.processing_class("w3 w4")["input_ids"]
    assert len(callback.results) == 3


def test_q_is_found_on_the_training_data_or_on_the_data_given(tmp_path):
    for name, calibration in (("train", None), ("given", Texts(40, 5))):
        trainer = make_trainer(tmp_path / name)
        HFDeltaPruneCallback("darex-q", 0.99, calibration_dataset=calibration).attach(trainer)
        trainer.train()
    rows = [rows_in(tmp_path / name / "out" / "deltas")[-1] for name in ("train", "given")]
    assert [row["q_split"] for row in rows] == ["64 items of train_dataset", "40 items of calibration_dataset"]
    assert all(0.01 <= row["q"] <= 1 for row in rows)


@pytest.mark.parametrize("method", ["wanda", "darex-q-layer", "darex-learned", "dppa", "importance"])
def test_methods_that_need_data_run(tmp_path, method):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    callback = HFDeltaPruneCallback(method, 0.5).attach(trainer)
    trainer.train()
    assert callback.results[-1].method == method


def test_q_by_the_metric_and_several_evaluation_sets(tmp_path):
    sets = {"a": Texts(64, 7), "b": Texts(96, 8)}
    trainer = make_trainer(tmp_path, evaluated=sets)
    callback = HFDeltaPruneCallback(
        "darex-q", 0.9, monitor="eval_b_accuracy", objective="metric", calibration_dataset=Texts(40, 9)
    ).attach(trainer)
    trainer.train()
    assert callback.results[1].score == trainer.evaluate()["eval_b_accuracy"]
    assert callback.results[-1].q_split == "calibration_dataset"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Texts(64, 1))


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"monitor": "f1"}, {}, "monitor='eval_f1' is not among the metrics of Trainer.evaluate: eval_accuracy"),
        ({"method": "darex-q"}, {"train": Stream(), "max_steps": 2}, "pass calibration_dataset="),
        ({"method": "darex-q", "output_layer": "nowhere"}, {}, "output_layer 'nowhere' is no submodule"),
        ({"monitor": "eval_c_accuracy"}, {"evaluated": {"a": Texts(8, 2)}}, "is of none of the evaluation sets a"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, settings, arguments, message):
    trainer = make_trainer(tmp_path, **arguments)
    HFDeltaPruneCallback(**({"method": "dare"} | settings)).attach(trainer)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        trainer.train()
    assert message in str(caught.value)
    assert trainer.state.global_step == 0


def test_a_callback_without_its_trainer_says_how_to_attach_it(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[HFDeltaPruneCallback("dare")])
    with pytest.raises(ValueError, match=r"prune\.attach\(trainer\)"):
        trainer.train()


def test_resumed_training_asks_for_the_base_and_takes_it(tmp_path):
    model = fresh_model()
    model.save_pretrained(tmp_path / "base")
    make_trainer(tmp_path, model, save_strategy="epoch", num_train_epochs=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-10")
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    with pytest.raises(ValueError, match=r"training resumes at step 10, .*pretrained="):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare", 0.5, pretrained=str(tmp_path / "base")).attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    pruned, by_hand = fresh_model(), fresh_model()
    SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / "dare-p0.5-seed0").apply_(pruned)
    prune(fresh_model(), trainer.model, "dare", 0.5, 0).apply_(by_hand)
    assert equal(values_of(pruned), values_of(by_hand))


def test_a_diverged_training_ends_well(tmp_path):
    class Diverged(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.classifier.weight.fill_(float("nan"))

    trainer = make_trainer(tmp_path, callbacks=[Diverged()])
    callback = HFDeltaPruneCallback("dare").attach(trainer)
    with pytest.warns(UserWarning, match="did not prune.*classifier"):
        trainer.train()
    assert callback.results == []


def test_a_lora_adapter_is_pruned_and_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh_model(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    trainer = make_trainer(tmp_path, model)
    callback = HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    before = values_of(model)
    trainer.train()
    assert len(callback.results) == 3
    folder = tmp_path / "out" / "deltas" / "dare-p0.5-seed0" / "adapter"
    loaded = peft.PeftModel.from_pretrained(fresh_model(), folder)
    trainer.model, finetuned = loaded, values_of(model)
    assert trainer.evaluate()["eval_accuracy"] == callback.results[-1].score
    assert not equal(before, finetuned)


@pytest.mark.parametrize(
    ("settings", "lora", "message"),
    [
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa' takes a part of the base's weights"),
        ({"init_lora_weights": "olora"}, "merged", "init_lora_weights='olora'"),
        ({"trainable_token_indices": [1, 2]}, "merged", "does not merge trainable_token_indices"),
    ],
)
def test_adapters_that_are_no_sum_with_the_base_are_refused_before_training(tmp_path, settings, lora, message):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **settings)
    trainer = make_trainer(tmp_path, peft.get_peft_model(fresh_model(), config))

    def train():
        HFDeltaPruneCallback("dare", 0.5, lora=lora).attach(trainer)
        trainer.train()

    with pytest.raises(ValueError, match=message):
        train()
    assert trainer.state.global_step == 0


def test_an_adapter_beside_the_active_one_is_not_pruned(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = peft.get_peft_model(fresh_model(), config)
    model.add_adapter("other", config)
    model.set_adapter("default")
    HFDeltaPruneCallback("dare", 0.5).attach(trainer := make_trainer(tmp_path, model))
    trainer.train()
    delta = SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / "dare-p0.5-seed0")
    assert delta.tensors
    assert not [name for name in delta.tensors if ".other." in name]


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_trainer_that_evaluates_an_average_of_its_own_is_refused(tmp_path, from_the_start):
    class Averaging(Trainer):
        average = None

        def training_step(self, *arguments, **settings):
            loss = super().training_step(*arguments, **settings)
            self.average = self.average or values_of(self.model)
            return loss

        def evaluate(self, *arguments, **settings):
            if self.average is None:
                return super().evaluate(*arguments, **settings)
            kept = values_of(self.model)
            self.model.load_state_dict(self.average)
            try:
                return super().evaluate(*arguments, **settings)
            finally:
                self.model.load_state_dict(kept)

    trainer = make_trainer(tmp_path, trainer_class=Averaging)
    trainer.average = values_of(trainer.model) if from_the_start else None
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    with pytest.raises(ValueError, match="puts other weights in the place of"):
        trainer.train()
    assert (trainer.state.global_step == 0) is from_the_start
