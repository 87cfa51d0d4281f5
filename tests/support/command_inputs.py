"""Inputs of the commands on files: a base, models fine-tuned from it, a checkpoint, deltas."""

import torch
from tiny_glue import make_model
from transformers import BertForSequenceClassification, BertModel

from dpp_lightning.methods.pruning_spec import PruningSpec
from dpp_lightning.pruning.prune_checkpoints import prune_checkpoint


def make_inputs(place):
    """A base, two classifiers fine-tuned from it, ``tuned`` also as a checkpoint, and deltas ``a`` and ``b`` with heads of
    their own; returns the folder."""
    base = make_model(place / "base", BertModel)
    for k, name in enumerate(("tuned", "other")):
        torch.manual_seed(k)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=2 + k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        model.save_pretrained(place / name)
        prune_checkpoint(base, place / name, place / "ab"[k], PruningSpec("dare", 0.5, seed=k))
    tuned = BertForSequenceClassification.from_pretrained(place / "tuned")
    state = {f"model.{name}": tensor for name, tensor in tuned.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"pretrained": "tuned"}}, place / "last.ckpt")
    return place
