"""KeptParameters: what an optimizer holds after parameters gave way to their trained entries."""

import pytest
import torch
from torch import nn

from dpp_lightning.optim.kept_parameters import KeptParameters


def test_parameters_without_trained_entries_leave_their_group_and_whole_ones_stay():
    net = nn.Linear(4, 3)
    extra = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adagrad([("weight", net.weight), ("bias", net.bias), ("extra", extra)], lr=0.1)
    kept = {net.weight: torch.tensor([2, 9]), net.bias: torch.empty(0, dtype=torch.int64), extra: torch.tensor([0])}
    trained = KeptParameters(optimizer, kept)
    (group,) = optimizer.param_groups
    assert group["param_names"] == ["weight", "extra"]
    assert [p.shape for p in group["params"]] == [(2,), ()]
    assert group["params"][1] is extra
    assert optimizer.state.keys() == set(group["params"])
    assert (trained.num_kept, trained.num_entries) == (3, 16)
    before = net.weight.detach().clone()
    (net(torch.ones(1, 4)).sum() * extra).backward()
    trained.gather_gradients()
    assert net.bias.grad is None
    optimizer.step()
    assert (net.weight.detach() != before).flatten().nonzero().flatten().tolist() == [2, 9]
    trained.release()
    with torch.no_grad():
        group["params"][0].zero_()
    optimizer.step()
    assert (net.weight.detach() != before).sum() == 2


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    trained = KeptParameters(torch.optim.SGD(embedding.parameters(), lr=0.1), {embedding.weight: torch.tensor([1])})
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="pass sparse=False"):
        trained.gather_gradients()
