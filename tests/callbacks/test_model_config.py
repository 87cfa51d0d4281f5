"""config.json of a delta that the callback writes: the model as it is now, and no path of the machine."""

import json
import shutil

import lightning.pytorch as pl
import pytest
import timm
import torch
from prune_fits import callback
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning.cli import main
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


class Images(Classifier):
    def test_step(self, batch, index):
        self.log("acc", (self.model(batch).argmax(-1) == 0).float().mean())


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


def timm_delta(folder, model):
    """The folder of a delta of a model of timm that was moved a little from a base in ``folder / "base"``."""
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    timm.models.save_for_hf(base, str(folder / "base"), safe_serialization=True)
    model.load_state_dict({n: t for n, t in base.state_dict().items() if not n.startswith("head.")}, strict=False)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(0.01)
    prune = callback(folder / "deltas", pretrained=str(folder / "base"), pruning_rate=0.5)
    pl.Trainer(**QUIET, callbacks=[prune]).test(Images(model), DataLoader(torch.randn(4, 3, 32, 32), 2), verbose=False)
    return next((folder / "deltas").glob("*/delta_config.json")).parent


SMALL = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}


def test_the_dense_model_of_a_timm_delta_is_built_by_its_config_json(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    apply_checkpoint(tmp_path / "base", timm_delta(tmp_path, model), tmp_path / "dense")
    dense = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True)
    assert dense.num_classes == 5
    assert dense.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(dense.head.weight, model.head.weight)


def test_a_head_that_was_put_in_by_hand_is_not_in_timm_s_configuration(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    model.head = torch.nn.Linear(16, 5)
    folder = timm_delta(tmp_path, model)
    assert not (folder / "config.json").exists()
    with pytest.warns(UserWarning, match="does not fit head.bias .5 rows, there 3."):
        apply_checkpoint(tmp_path / "base", folder, tmp_path / "dense")


def test_dpp_apply_says_what_loads_the_dense_folder(tmp_path, capsys):
    folder = timm_delta(tmp_path, timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL))
    said = []
    for file in (folder / "config.json", tmp_path / "base" / "config.json"):
        assert (
            main(["apply", str(tmp_path / "base"), str(folder), "--output", str(tmp_path / "dense"), "--overwrite"])
            == 0
        )
        said.append(capsys.readouterr().err)
        file.unlink()
    shutil.copytree(tmp_path / "base", tmp_path / "bare")
    assert main(["apply", str(tmp_path / "bare"), str(folder), "--output", str(tmp_path / "other")]) == 0
    said.append(capsys.readouterr().err)
    assert "timm.create_model('local-dir:" in said[0]
    assert "timm.create_model('local-dir:" in said[1], "the base's config.json"
    assert "safetensors.torch.load_file, as there is no config.json" in said[2]
