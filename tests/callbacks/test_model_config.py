"""config.json of a delta that the callback writes: the model as it is now, and no path of the machine."""

import json

import lightning.pytorch as pl
import torch
from prune_fits import callback
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning.delta.apply_to_checkpoint import apply_checkpoint

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Classifier(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def test_step(self, batch, index):
        tokens, labels = batch[:, :-1], batch[:, -1]
        self.log("acc", (self.model(tokens).logits.argmax(-1) == labels).float().mean())


def test_config_json_has_the_dtype_of_the_model_and_no_path(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    base = tmp_path / "secret-place"
    BertForSequenceClassification(config).to(torch.bfloat16).save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    assert str(base) in model.config.to_json_string(use_diff=False)
    model = model.float()  # the configuration goes on to say bfloat16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    module = Classifier(model)
    prune = callback(tmp_path / "deltas", pretrained=str(base), pruning_rate=0.5)
    trainer = pl.Trainer(**QUIET, callbacks=[prune])
    trainer.test(module, DataLoader(torch.randint(0, 3, (8, 5)), batch_size=4), verbose=False)
    (path,) = (tmp_path / "deltas").glob("*/config.json")
    written = json.loads(path.read_text())
    assert "secret-place" not in path.read_text()
    assert (written["dtype"], written["architectures"]) == ("float32", ["BertForSequenceClassification"])
    assert len(written["id2label"]) == 3
    apply_checkpoint(base, path.parent, tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.bfloat16  # the base's, which the tensors have
    assert json.loads((tmp_path / "dense/config.json").read_text())["dtype"] == "bfloat16"
