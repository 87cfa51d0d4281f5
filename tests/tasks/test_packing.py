"""Packing: every sample once, rows that are full, and no sample that sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_causal import make_decoder
from torch import nn

from dpp_lightning.tasks.causal_lm.batches import Collate
from dpp_lightning.tasks.causal_lm.packing import check_packing_isolates, pack, packed_row
from dpp_lightning.tasks.causal_lm.scores import answer_loss

SAMPLES = [([5, 6, 7, 8], [-100, -100, 7, 8]), ([9, 10, 11], [-100, 10, 11]), ([4, 12], [4, 12])]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_sample_once_and_no_row_too_full(lengths):
    rows = pack(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    full = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= 20 for total in full)
    assert len(rows) <= max(1, 2 * -(-sum(lengths) // 20)) or not lengths
    assert sum(total <= 10 for total in full) <= 1  # two half-empty rows would have become one


def test_a_row_starts_each_sample_at_position_0_and_never_asks_for_its_first_token():
    row = packed_row(SAMPLES, 12, pad=1)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 10, 11, 4, 12, 1, 1, 1]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]
    assert row["labels"].tolist() == [-100, -100, 7, 8, -100, 10, 11, -100, 12, -100, -100, -100]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_packed_and_padded_batches_have_one_loss_and_one_gradient(kind):
    plain = [{"input_ids": ids, "labels": labels} for ids, labels in SAMPLES]
    gradients, losses = [], []
    for batch in (Collate(1)(plain), Collate(1, 8)([plain[:1], plain[1:]])):
        model = make_decoder(kind).eval()
        labels = batch.pop("labels")
        total, count = answer_loss(model(**batch, use_cache=False).logits, labels)
        total.backward()
        losses.append((total.item(), int(count)))
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0][1] == losses[1][1] == 5
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * a.abs().max().item() + 1e-6)


class Leaky(nn.Module):
    """Takes no notice of positions: all tokens of a row see all before them."""

    def __init__(self):
        super().__init__()
        self.model = make_decoder()

    def forward(self, input_ids, position_ids=None, use_cache=None):
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_mixes_packed_samples_is_refused():
    check_packing_isolates(make_decoder(), [3, 4, 5], [6, 7])
    with pytest.raises(ValueError, match=r"Leaky lets a packed sample attend to.*data\.packing"):
        check_packing_isolates(Leaky(), [3, 4, 5], [6, 7])
