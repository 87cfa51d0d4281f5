"""``auto``: every form within the bytes, the one with the least held-out loss kept, trained as it was asked for."""

import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dpp_lightning import prune
from dpp_lightning.calibration import Calibration
from dpp_lightning.calibration.distillation import Distillation
from dpp_lightning.delta.folder import delta_bytes
from dpp_lightning.methods import PruningSpec


@pytest.fixture
def models():
    """Base and fine-tuned weights, and training toward the latter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes)).eval()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = {n: t + 0.05 * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()}
    model.load_state_dict(tuned)
    pieces = [{"input_ids": torch.randint(5, 60, (32, 10))} for _ in range(4)]
    training = Distillation(model, pieces, lambda piece: model(**piece).logits, samples=128)
    model.load_state_dict(base)
    return base, tuned, training


@pytest.mark.parametrize("max_bytes", [5_000, 6_000, 8_000])
def test_the_form_with_the_least_loss_within_the_bytes_is_kept(models, max_bytes, tmp_path):
    """Of all that is in the file: what it says of itself too."""
    base, tuned, training = models
    calibration = Calibration(lambda _: 0.0, distillation=training)
    delta = prune(base, tuned, "auto", calibration=calibration, max_bytes=max_bytes, steps=5)
    delta.save_pretrained(tmp_path / "delta")
    assert 0.8 * max_bytes < delta_bytes(tmp_path / "delta") <= max_bytes
    compared = delta.info.training["compared"]
    losses = [float(re.search(r"loss ([\d.]+)$", line)[1]) for line in compared]
    forms = {line.split(":")[0].split(" (")[0] for line in compared}
    assert forms == {"importance", "refit", "lowrank", "lowrank and a rest"}
    assert training.loss(delta) == pytest.approx(min(losses), abs=1e-3)


def test_settings_of_training_go_to_every_form_that_trains(models, monkeypatch):
    base, tuned, training = models
    given, train = [], training.train
    monkeypatch.setattr(
        training, "train", lambda delta, settings, *rest: given.append(settings) or train(delta, settings)
    )
    calibration = Calibration(lambda _: 0.0, distillation=training)
    prune(base, tuned, "auto", calibration=calibration, max_bytes=6_000, steps=3, loss="block")
    assert len(given) >= 2
    assert {(settings.steps, settings.by_block) for settings in given} == {(3, True)}
    with pytest.raises(ValueError, match="loss must be one of auto, model, block"):
        PruningSpec("auto", method_settings={"max_bytes": 9000, "loss": "layer"})
