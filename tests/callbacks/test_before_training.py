"""What cannot be pruned, or not as asked for, is refused before training, which then takes no step."""

import pytest
import torch
from tiny import Foreign, train_loader, trainer, val_loader
from tiny_glue import bert_config
from torch import nn
from transformers import BertModel

from dpp_lightning.callbacks import DeltaPruneCallback


class Convolutions(Foreign):
    """A network of which three quarters of the weights are convolutions."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 16, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
            nn.Linear(16, 3),
        )  # fmt: skip
        self.steps = 0

    def forward(self, rows):
        return self.net(rows)

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Plain(Convolutions):
    def __init__(self):
        super().__init__()
        self.net = Foreign().net


@pytest.mark.parametrize(
    ("module", "method", "settings", "said"),
    [
        (Convolutions, "wanda", {}, "wanda goes by the inputs of linear maps, and 1 of 2 weights"),
        (Convolutions, "darex-q-layer", {}, "darex-q-layer goes by the inputs of linear maps"),
        (Convolutions, "importance", {"score": "activation"}, "Take score=magnitude"),
        (Plain, "refit", {"loss": "block"}, "loss=block is not for Plain, whose blocks go by no known names"),
        (Plain, "refit", {"activations": "recomputed"}, "Plain has no gradient checkpointing"),
    ],
)
def test_a_method_that_the_model_or_its_settings_do_not_allow(tmp_path, module, method, settings, said):
    lit = module()
    callback = DeltaPruneCallback(
        ["dare", method], 0.5, monitor="acc", output_dir=str(tmp_path), method_settings={method: settings}
    )
    with pytest.raises(ValueError, match=said):
        trainer(callback).fit(lit, train_loader(), val_loader())
    assert lit.steps == 0


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("struct-dare", {"a": 0.05}, "pruning_rate"),
        ("struct-darex-q", {"a": 0.5, "b": 0.5}, "a b must be 1 - pruning_rate"),
        ("owl", {"fluctuation": -1}, "fluctuation"),
        ("dppa", {"outlier_factor": 0}, "outlier_factor"),
    ],
)
def test_settings_out_of_range_are_refused_when_the_callback_is_made(method, settings, said):
    with pytest.raises(ValueError, match=said):
        DeltaPruneCallback(method, 0.9, monitor="acc", method_settings={method: settings})


class Encoder(Foreign):
    """A transformers model with a head of the module's own."""

    def __init__(self):
        super().__init__()
        self.encoder, self.net = BertModel(bert_config()), nn.Linear(32, 3)

    def forward(self, rows):
        return self.net(self.encoder((rows.abs() * 5).long().clamp(0, 20)).pooler_output)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("carry", [(), ("net.*",)])
def test_a_head_whose_base_is_in_no_file_is_warned_of(tmp_path, carry, recwarn):
    module = Encoder()
    module.net = nn.Linear(module.encoder.config.hidden_size, 3)
    callback = DeltaPruneCallback("dare", 0.5, monitor="acc", output_dir=str(tmp_path), carry=carry)
    trainer(callback, max_steps=1).fit(module, train_loader(), val_loader())
    told = [str(warning.message) for warning in recwarn if "no part of the pre-trained model" in str(warning.message)]
    assert len(told) == (not carry)
    assert all("net.bias, net.weight" in line and "carry=['net.*']" in line for line in told)
    assert torch.isfinite(torch.tensor([row.score for row in callback.results])).all()
