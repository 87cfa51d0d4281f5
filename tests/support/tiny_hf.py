"""A tiny classifier in a Trainer of transformers, and what a run of HFDeltaPruneCallback leaves."""

import json

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

CONFIG = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_labels": 2,
}  # fmt: skip


class Texts(Dataset):
    """Twelve tokens; label 1 where the first of them is of the upper half of the words."""

    def __init__(self, items, seed):
        self.tokens = torch.randint(5, 24, (items, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": (tokens[0] > 14).long()}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def fresh_model():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**CONFIG))


def make_trainer(tmp_path, model=None, callbacks=(), trainer_class=Trainer, train=None, evaluated=None, **arguments):
    values = {
        "output_dir": str(tmp_path / "out"), "num_train_epochs": 2, "learning_rate": 5e-3, "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32, "eval_strategy": "epoch", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return trainer_class(
        model or fresh_model(),
        TrainingArguments(**(values | arguments)),
        train_dataset=train or Texts(320, 1),
        eval_dataset=evaluated or Texts(96, 2),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )


def values_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
