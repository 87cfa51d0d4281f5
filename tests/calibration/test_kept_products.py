"""Gradients of kept entries and of factors alone are those of dense autograd."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, embedding, linear

from dpp_lightning.calibration.kept_products import KeptProducts, TrainedWeight, products_at


def positions_of(numel, count, seed=0):
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("count", [0, 3, 500])
def test_products_at_some_entries(count):
    rows, columns = torch.randn(7, 40, dtype=torch.float64), torch.randn(7, 30, dtype=torch.float64)
    positions = positions_of(1200, count)
    expected = (rows.t() @ columns).view(-1)[positions]
    assert torch.allclose(products_at(rows, columns, positions), expected)


CALLS = {
    "linear": (lambda x, w, b: linear(x, w, b), (5, 40), (30, 40)),
    "conv1d of transformers": (lambda x, w, b: torch.addmm(b, x, w), (5, 40), (40, 30)),
    "matmul": (lambda x, w, b: x @ w + b, (5, 40), (40, 30)),
    "linear of tokens": (lambda x, w, b: linear(x, w, b), (2, 5, 40), (30, 40)),
    "linear, changed in place": (lambda x, w, b: linear(x, w, b).div_(3), (2, 5, 40), (30, 40)),
    "linear of one row": (lambda x, w, b: linear(x, w, b), (40,), (30, 40)),
    "convolution": (lambda x, w, b: conv2d(x, w, b, padding=1), (2, 4, 6, 5), (30, 4, 3, 3)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kept", [5, 300])
def test_the_gradients_of_kept_entries_are_those_of_the_whole_weight(call, kept):
    function, x_shape, w_shape = CALLS[call]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(30, dtype=torch.float64, requires_grad=True)
    whole = nn.Parameter(torch.randn(w_shape, dtype=torch.float64))
    function(x, whole, bias).square().sum().backward()
    expected = whole.grad.view(-1), x.grad.clone(), bias.grad.clone()
    x.grad = bias.grad = None
    weight, positions = nn.Parameter(whole.detach().clone(), requires_grad=False), positions_of(whole.numel(), kept)
    values = torch.zeros(kept, dtype=torch.float64, requires_grad=True)
    with KeptProducts({id(weight): TrainedWeight(positions, values)}):
        function(x, weight, bias).square().sum().backward()
    assert torch.allclose(values.grad, expected[0][positions])
    assert torch.allclose(x.grad, expected[1])
    assert torch.allclose(bias.grad, expected[2])
    assert weight.grad is None


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kept", [5, 300])
def test_under_autocast_the_gradients_are_those_of_dense_autograd_under_it(call, kept):
    function, x_shape, w_shape = CALLS[call]
    x, bias = torch.randn(x_shape, requires_grad=True), torch.randn(30, requires_grad=True)
    whole = nn.Parameter(torch.randn(w_shape))
    weight, positions = nn.Parameter(whole.detach().clone(), requires_grad=False), positions_of(whole.numel(), kept)
    values = torch.zeros(kept, requires_grad=True)
    gradients = []
    for w, numbers in ((whole, whole), (weight, values)):
        with KeptProducts({id(weight): TrainedWeight(positions, values)}):
            with torch.autocast("cpu", torch.bfloat16):
                loss = function(x, w, bias).float().sin().sum()
            gradients.append(torch.autograd.grad(loss, (numbers, x, bias)))
    expected, ours = gradients
    for one, other in zip(ours, (expected[0].view(-1)[positions], *expected[1:]), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("call", CALLS)
def test_the_gradients_of_factors_are_those_through_the_product(call):
    function, x_shape, w_shape = CALLS[call]
    x, bias = torch.randn(x_shape, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(w_shape, dtype=torch.float64), requires_grad=False)
    columns = weight.numel() // w_shape[0]
    left, right = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((w_shape[0], 2), (2, columns)))
    expected_y = function(x, weight + (left @ right).view(w_shape), bias)
    expected = torch.autograd.grad(expected_y.square().sum(), (left, right))
    part = TrainedWeight(torch.empty(0, dtype=torch.int64), None, left, right)
    with KeptProducts({id(weight): part}):
        y = function(x, weight, bias)
    assert torch.allclose(y, expected_y)
    for one, other in zip(torch.autograd.grad(y.square().sum(), (left, right)), expected, strict=True):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("look_up", [embedding, lambda rows, table: embedding(rows, table).mul_(3)])
def test_rows_that_are_looked_up(look_up):
    rows = torch.tensor([[1, 3, 3], [0, 1, 6]])
    whole = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
    look_up(rows, whole).pow(3).sum().backward()
    weight, positions = nn.Parameter(whole.detach().clone(), requires_grad=False), positions_of(40, 20)
    values = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    with KeptProducts({id(weight): TrainedWeight(positions, values)}):
        look_up(rows, weight).pow(3).sum().backward()
    assert torch.allclose(values.grad, whole.grad.view(-1)[positions])


def test_other_uses_of_a_weight_are_noticed():
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    values = torch.zeros(2, requires_grad=True)
    with KeptProducts({id(weight): TrainedWeight(torch.tensor([0, 5]), values)}) as products:
        assert products.unknown_in(lambda: linear(torch.randn(3, 4), weight).shape + weight.shape) == set()
        assert products.unknown_in(lambda: torch.einsum("ij,kj->ki", weight, torch.randn(3, 4))) == {id(weight)}
        assert products.unknown_in(lambda: torch.randn(3, 4) @ weight.T) == {id(weight)}
        assert products.unknown_in(lambda: torch.randn(3, 4) @ weight.mT) == {id(weight)}
