"""A tiny classifier as base, deltas of fine-tunings with heads of other labels, and the dense models they stand for."""

import json
import shutil

import torch
from tiny_glue import bert_config, make_model
from transformers import BertForSequenceClassification, pipeline

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint
from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint
from dpp_lightning.pruning.scope import Scope

LABELS = {"sst2": ["negative", "positive"], "mnli": ["yes", "maybe", "no"], "cola": ["bad", "good"]}
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10", "w3 w3 w3 w11 w12 w13"]


def fine_tune(base, folder, labels, seed, model_class=BertForSequenceClassification, **config):
    """A folder with the base's weights plus noise, a head of its own and its labels."""
    names = dict(enumerate(labels))
    torch.manual_seed(seed)
    model = model_class.from_pretrained(
        base, id2label=names, label2id={name: number for number, name in names.items()}, ignore_mismatched_sizes=True,
        **config,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def make_deltas(folder, labels=None, model_class=BertForSequenceClassification):
    """A base, a delta for each task, and its dense model: ``base``, ``delta/TASK``, ``dense/TASK`` in the folder."""
    base = make_model(folder / "base", model_class, bert_config(id2label={0: "old", 1: "new"}))
    for seed, (task, names) in enumerate((labels or LABELS).items(), 1):
        fine_tune(base, folder / "tuned" / task, names, seed, model_class)
        add_delta(folder, task, carry=("classifier.*",) if hasattr(model_class(bert_config()), "classifier") else ())
    return folder


def add_delta(folder, task, carry=("classifier.*",)):
    """The delta of ``tuned/TASK`` and the dense model that it stands for."""
    scope = Scope(carry=carry)
    prune_checkpoint(
        folder / "base", folder / "tuned" / task, folder / "delta" / task, PruningSpec("dare", 0.5), scope=scope
    )
    apply_checkpoint(folder / "base", folder / "delta" / task, folder / "dense" / task)


def drop_config(delta, folder):
    """A copy of a delta's folder that says nothing of labels."""
    shutil.copytree(delta, folder)
    (folder / "config.json").unlink()
    return folder


def change_config(folder, **values):
    """Other values in a folder's ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def dense_pipeline(folder, task, kind="text-classification", **settings):
    """The pipeline over the dense fine-tuned model; over the base for None."""
    place = str(folder / "base" if task is None else folder / "dense" / task)
    return pipeline(kind, model=place, tokenizer=place, device="cpu", **settings)


def close(one, other, tolerance=1e-5):
    """Equal results of pipelines, numbers to a tolerance."""
    if isinstance(one, float):
        return abs(one - other) <= tolerance
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return one == other
