"""Which base HFDeltaPruneCallback takes where a Trainer's training resumes, was cut short, or is repeated."""

import logging
from copy import deepcopy

import pytest
import torch
from tiny_hf import CONFIG, equal, fresh_model, make_trainer, rows_in, values_of
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from dpp_lightning import SparseDelta, prune
from dpp_lightning.callbacks import HFDeltaPruneCallback
from dpp_lightning.optim import AdamR

DELTA = "dare-p0.5-seed0"


def first_epoch(tmp_path, *, attached=True, **settings):
    """A training of one epoch whose checkpoint is in the trainer's folder; the folder of its table."""
    trainer = make_trainer(tmp_path, save_strategy="epoch", num_train_epochs=1)
    if attached:
        HFDeltaPruneCallback("dare", 0.5, output_dir=str(tmp_path / "first"), **settings).attach(trainer)
    trainer.train()


def is_delta_of(folder, base, finetuned):
    saved, by_hand = deepcopy(base), deepcopy(base)
    SparseDelta.from_pretrained(folder).apply_(saved)
    prune(base, finetuned, "dare", 0.5, 0).apply_(by_hand)
    return equal(values_of(saved), values_of(by_hand))


def test_resumed_training_has_the_base_of_the_first(tmp_path):
    first_epoch(tmp_path)
    trainer = make_trainer(tmp_path)
    callback = HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert is_delta_of(tmp_path / "out" / "deltas" / DELTA, fresh_model(), trainer.model)
    first = rows_in(tmp_path / "first")
    assert first[0]["score"] == callback.results[0].score
    assert first[0]["run"]["base"] == rows_in(tmp_path / "out" / "deltas")[0]["run"]["base"]
    assert first[0]["run"]["fine-tuned"] != rows_in(tmp_path / "out" / "deltas")[0]["run"]["fine-tuned"]


def test_resumed_training_refuses_another_base_than_the_first(tmp_path):
    first_epoch(tmp_path)
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path, BertForSequenceClassification(BertConfig(**CONFIG)))
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    with pytest.raises(ValueError, match=r"is not the one that the checkpoint's training began from [^\n]*carry="):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10  # of the checkpoint


def test_a_new_head_of_other_values_is_no_other_base_if_it_is_carried(tmp_path):
    first_epoch(tmp_path, carry=["classifier.*"])
    model = fresh_model()
    torch.nn.init.normal_(model.classifier.weight)
    trainer = make_trainer(tmp_path, model)
    callback = HFDeltaPruneCallback("dare", 0.5, carry=["classifier.*"]).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert len(callback.results) == 3


def test_the_optimizer_tells_the_base_where_no_callback_was_attached(tmp_path):
    class WithAdamR(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = AdamR(self.model.parameters(), lr=5e-3)
            return self.optimizer

    trainer = make_trainer(tmp_path, save_strategy="epoch", num_train_epochs=1, trainer_class=WithAdamR)
    trainer.train()
    trainer = make_trainer(tmp_path, trainer_class=WithAdamR)
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert is_delta_of(tmp_path / "out" / "deltas" / DELTA, fresh_model(), trainer.model)


def test_training_that_resumes_from_a_base_that_nothing_tells_asks_for_it_and_takes_it(tmp_path):
    fresh_model().save_pretrained(tmp_path / "base")
    first_epoch(tmp_path, attached=False)
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    with pytest.raises(ValueError, match=r"training resumes at step 10, .*pretrained="):
        trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path)
    HFDeltaPruneCallback("dare", 0.5, pretrained=str(tmp_path / "base")).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert is_delta_of(tmp_path / "out" / "deltas" / DELTA, fresh_model(), trainer.model)


def test_a_lora_adapter_resumes_against_its_base_of_zero(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        return peft.get_peft_model(fresh_model(), peft.LoraConfig(target_modules=["query", "value"]))

    trainer = make_trainer(tmp_path, adapted(), save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    trainer = make_trainer(tmp_path, adapted())
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    delta = SparseDelta.from_pretrained(tmp_path / "out" / "deltas" / DELTA)
    assert all("lora_" in name for name, part in delta.tensors.items() if len(part.values))


class CutShort(TrainerCallback):
    def __init__(self):
        self.cut = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 15 and not self.cut:
            self.cut = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("resumes", [True, None])
def test_a_training_that_was_cut_short_keeps_its_base_for_the_next(tmp_path, resumes):
    trainer = make_trainer(tmp_path, save_strategy="epoch", callbacks=[CutShort()])
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=resumes)
    assert is_delta_of(tmp_path / "out" / "deltas" / DELTA, fresh_model(), trainer.model)


def test_a_second_training_says_that_its_base_is_what_the_first_left(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    callback = HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train()
    finetuned = callback.results[1].score
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        trainer.train()
    assert callback.results[0].score == finetuned
    assert "the base of this training is what the earlier one left" in caplog.text


def test_a_finished_training_that_resumes_makes_the_rows_that_are_missing(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    HFDeltaPruneCallback("dare", 0.5).attach(trainer)
    trainer.train()
    folder = tmp_path / "out" / "deltas"
    before = (folder / "results.jsonl").read_text()
    trainer = make_trainer(tmp_path)
    callback = HFDeltaPruneCallback("dare", [0.5, 0.9], resume=True).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert (folder / "results.jsonl").read_text().startswith(before)
    assert [(r.method, r.pruning_rate) for r in callback.results[2:]] == [("dare", 0.5), ("dare", 0.9)]
    assert sorted(p.name for p in folder.iterdir()) == ["dare-p0.5-seed0", "dare-p0.9-seed0", "results.jsonl"]


def test_rows_of_other_weights_are_not_continued(tmp_path):
    for rate, epochs in ((0.5, 1), (0.9, 2)):
        trainer = make_trainer(tmp_path, num_train_epochs=epochs)
        HFDeltaPruneCallback("dare", rate, resume=True).attach(trainer)
        if epochs == 1:
            trainer.train()
            continue
        with pytest.raises(ValueError, match="holds the rows of another run: fine-tuned"):
            trainer.train()
