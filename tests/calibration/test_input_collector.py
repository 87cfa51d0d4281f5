"""Inputs of layers: sums against dense twins, padding, several calls, modules that are never called."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from dpp_lightning.calibration.input_collector import collected_inputs


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.spare = nn.Embedding(11, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, ids):
        return self.linear(self.embed(ids))


def test_sums_over_several_calls_equal_those_over_all_tokens():
    model, ids = Small(), torch.randint(0, 11, (6, 5))
    with collected_inputs(model) as collector:
        model(ids[:4])
        model(ids[4:])
    x = model.embed(ids).reshape(-1, 4).double().detach()
    stats = collector.statistics
    assert stats["linear.weight"].tokens == 30
    assert torch.allclose(stats["linear.weight"].norm, x.norm(dim=0), rtol=1e-6)
    assert torch.allclose(stats["linear.weight"].mean, x.mean(0), atol=1e-7)
    assert torch.equal(stats["embed.weight"].total, torch.bincount(ids.flatten(), minlength=11).double())
    assert collector.uncalled == ["spare.weight"]
    assert "spare.weight" not in stats


def test_hooks_are_gone_afterwards_also_after_an_error():
    model = Small()
    with pytest.raises(IndexError), collected_inputs(model) as collector:
        model(torch.tensor([[99]]))
    before = collector.statistics
    model(torch.tensor([[1]]))
    assert before.keys() == collector.statistics.keys()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_token_that_did_not_come_keeps_a_chance():
    model = Small()
    with collected_inputs(model) as collector:
        model(torch.zeros(1, 8, dtype=torch.long))
    rms = collector.statistics["embed.weight"].rms
    assert (rms > 0).all()
    assert rms[0] > 3 * rms[1]


def test_padding_does_not_count():
    config = BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 30, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    with collected_inputs(model) as padded:
        model(input_ids=ids, attention_mask=mask)
    with collected_inputs(model) as alone:
        model(input_ids=ids[:1], attention_mask=mask[:1])
        model(input_ids=ids[1:, :3], attention_mask=mask[1:, :3])
    name = "encoder.layer.0.attention.self.query.weight"
    assert padded.statistics[name].tokens == alone.statistics[name].tokens == 9
    assert torch.allclose(padded.statistics[name].squares, alone.statistics[name].squares, rtol=1e-5)


def test_conv1d_indexes_its_first_dimension_and_a_tied_head_counts_once():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with collected_inputs(model) as collector:
        model(input_ids=torch.randint(0, 20, (1, 5)))
    stats = collector.statistics
    up = next(s for n, s in stats.items() if n.endswith("mlp.c_proj.weight"))
    assert (up.axis, len(up.squares)) == (0, 32)
    assert sum(n.endswith("wte.weight") or "lm_head" in n for n in stats) == 1
