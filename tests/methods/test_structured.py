"""Structured selection: columns, rates, unbiasedness, determinism."""

import pytest
import torch

from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.structured import column_shares, structured
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.tensors.blocks import block_of, is_linear_map

NAME = "layers.0.q.weight"


def pair_of(delta, name=NAME, axis=1):
    x = (
        InputStatistics(torch.ones(delta.shape[axis]), torch.ones(delta.shape[axis]), 1, axis)
        if delta.dim() == 2
        else None
    )
    placed = {"block": block_of(name), "linear": is_linear_map(name, delta.shape)}
    return TensorPair.of(name, torch.zeros_like(delta), delta, x, **placed)


def dense(pair, kept):
    out = torch.zeros(pair.numel)
    out[kept.positions] = kept.values
    return out.view(pair.shape)


@pytest.mark.parametrize(("rate", "a", "b"), [(0.99, 0.05, 0.2), (0.999, 0.05, 0.02), (0.9, 0.1, 1.0), (0.5, 0.5, 1.0)])
def test_default_shares_are_those_of_table_9(rate, a, b):
    assert tuple(map(float, column_shares(rate, None, None))) == pytest.approx((a, b))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
def test_only_chosen_columns_have_entries(axis, rate):
    delta = torch.randn(200, 300)
    pair = pair_of(delta, axis=axis)
    (kept,) = structured([pair], rate, 3)
    out = dense(pair, kept)
    columns = (out != 0).any(1 - axis)
    share = float(column_shares(rate, None, None)[0])
    assert columns.sum() <= round(share * delta.shape[axis])
    assert len(kept.positions) == pytest.approx((1 - rate) * delta.numel(), rel=0.15)
    assert torch.equal(kept.positions, kept.positions.sort().values.unique())


def test_it_is_unbiased_over_seeds_also_where_a_share_rounds():
    """15 columns at a share of 0.05 are 1 column, 0.067: the rescaling uses the realised share."""
    delta = torch.ones(40, 15)
    total = sum(dense(pair_of(delta), next(structured([pair_of(delta)], 0.99, s))) for s in range(2000)) / 2000 / 0.01
    assert float(total.mean()) == pytest.approx(1.0, abs=0.03)


def test_it_depends_on_seed_and_name_alone():
    pair = pair_of(torch.randn(30, 40))
    again, other = (next(structured([pair], 0.9, s)).positions for s in (1, 2))
    assert torch.equal(again, next(structured([pair], 0.9, 1)).positions)
    assert not torch.equal(again, other)


def test_other_tensors_are_random_and_rate_0_keeps_all():
    bias = pair_of(torch.randn(5000), "layers.0.q.bias")
    _, kept = structured([pair_of(torch.randn(6, 7)), bias], 0.9, 0)
    assert kept.values is None
    assert len(kept.positions) == pytest.approx(500, rel=0.2)
    (kept,) = structured([pair_of(torch.randn(6, 7))], 0.0, 0)
    assert len(kept.positions) == 42


def test_experts_in_one_tensor_share_the_columns_of_their_last_dimension():
    delta = torch.randn(4, 50, 60)
    (kept,) = structured([pair_of(delta, "layers.0.mlp.experts.down_proj")], 0.9, 3, a=0.2)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[kept.positions] = True
    columns = mask.view(200, 60).any(0)
    assert columns.sum() == 12
    assert mask.view(4, 50, 60)[..., columns].float().mean(dim=(1, 2)).tolist() == pytest.approx([0.5] * 4, abs=0.1)


def test_tensors_without_a_linear_map_are_refused():
    with pytest.raises(
        ValueError, match=r"^struct-dare and struct-darex-q go by .* \(layers\.0\.\) hold none that is pruned"
    ):
        list(structured([pair_of(torch.randn(50), "layers.0.q.bias")], 0.9, 0))


@pytest.mark.parametrize(
    ("a", "b", "message"), [(0.5, 0.5, "a b must be"), (0.05, None, "would exceed 1"), (1.5, None, "in \\(0, 1\\]")]
)
def test_shares_that_cannot_be_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        column_shares(0.9, a, b)
