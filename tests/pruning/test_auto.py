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
from dpp_lightning.pruning.auto import _Sizes

FORMS = {"importance", "refit", "lowrank", "lowrank and a rest"}


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
    assert forms == FORMS
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


def mostly_embeddings(max_bytes, **settings):
    """auto on a model whose linear maps are few of its entries, and the training that it went by."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=4000, max_position_embeddings=16, **sizes)).eval()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    scale = {n: 0.0005 if "embeddings" in n else 0.05 for n in base}
    tuned = {n: t + scale[n] * torch.randn_like(t) if t.is_floating_point() else t for n, t in base.items()}
    model.load_state_dict(tuned)
    pieces = [{"input_ids": torch.randint(5, 4000, (32, 10))} for _ in range(4)]
    training = Distillation(model, pieces, lambda piece: model(**piece).logits, samples=128)
    model.load_state_dict(base)
    calibration = Calibration(lambda _: 0.0, distillation=training)
    limit = {"max_bytes": max_bytes} if max_bytes else {}
    return prune(base, tuned, "auto", calibration=calibration, steps=5, **limit, **settings), training


def test_more_bytes_than_a_form_can_use_leave_it_at_its_largest():
    losses = []
    for max_bytes in (3_500, 7_000, 14_000, 28_000):
        delta, training = mostly_embeddings(max_bytes)
        compared = delta.info.training["compared"]
        assert {line.split(":")[0].split(" (")[0] for line in compared} == FORMS, max_bytes
        losses.append(training.loss(delta))
        importance = next(int(line.split()[1].replace(",", "")) for line in compared if line.startswith("importance"))
        assert 0.9 * (max_bytes - 350) < importance <= max_bytes  # what is said of the others takes 350
    assert max(losses[1:]) <= losses[0]


def test_a_loss_is_reached_in_few_bytes_and_where_nothing_reaches_it_that_is_said():
    delta, training = mostly_embeddings(0, max_loss=1.0)
    assert training.loss(delta) <= 1.0
    with pytest.raises(ValueError, match="no form with a held-out loss of 1e-06 or less; the best was"):
        mostly_embeddings(0, max_loss=1e-6)
    compared = [line for line in delta.info.training["compared"] if float(line.rpartition(" ")[2]) <= 1.0]
    assert delta.num_bytes < 6_000
    assert len(compared) >= 1


def test_a_form_that_is_no_better_than_the_base_is_warned_of(monkeypatch):
    monkeypatch.setattr("dpp_lightning.pruning.auto._OF_BASE", 0.1)
    with pytest.warns(UserWarning, match="the best form is no better than the base"):
        delta, _ = mostly_embeddings(2_200)
    assert any("none within 2,200 bytes" in line for line in delta.info.training["compared"])


@pytest.mark.parametrize(
    ("method", "settings"),
    [("auto", {"max_bytes": 9_000}), ("auto", {"max_loss": 0.1}), ("lowrank", {"rank": 2}), ("refit", {})],
)
def test_where_nothing_but_a_head_was_trained_it_is_kept_whole(models, method, settings):
    base, tuned, training = models
    tuned = {name: tuned[name] if name.startswith("classifier") else tensor for name, tensor in base.items()}
    calibration = Calibration(lambda _: 0.0, distillation=training)
    delta = prune(base, tuned, method, 0.9, calibration=calibration, carry=["classifier.*"], **settings)
    assert not delta.tensors
    assert torch.equal(delta.carried["classifier.weight"], tuned["classifier.weight"])


def test_a_dtype_is_what_auto_chooses():
    with pytest.raises(ValueError, match="auto chooses how the values of its forms are held: leave dtype= out"):
        PruningSpec("auto", dtype="int4", method_settings={"max_bytes": 9000})
    with pytest.raises(ValueError, match="max_loss must be a finite number"):
        PruningSpec("auto", method_settings={"max_loss": float("nan")})


def test_sizes_close_in_on_the_bytes_that_are_wanted():
    for grows_by in (0.3, 1.0, 3.0):
        sizes, tried = _Sizes(16_000), 0
        while not sizes.done:
            bytes_of = int(900 + grows_by * sizes.next)
            sizes.add(bytes_of)
            tried += 1
        assert 0.95 * 16_000 <= sizes._fits[1] <= 16_000
        assert tried <= 6
