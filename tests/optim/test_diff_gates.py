"""DiffGates: the step of w and log alpha is that of autograd through θ0 + z ⊙ w, and the penalty closes gates."""

import pytest
import torch
from torch import nn

from dpp_lightning.optim import AdamR
from dpp_lightning.optim.diff_gates import DiffGates, stretched


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def loss_of(weight, bias):
    x = torch.linspace(-1, 1, 30).view(5, 6)
    return (torch.tanh(x @ weight.T + bias) - x[:, :4]).square().sum()


@pytest.mark.parametrize("entries_at_a_time", [13, 2**17])
@pytest.mark.parametrize("groups", [False, True])
def test_gradients_are_those_of_autograd_through_the_gates(groups, entries_at_a_time, monkeypatch):
    monkeypatch.setattr("dpp_lightning.optim.diff_gates._ENTRIES", entries_at_a_time)
    module, strength = net(), 0.01
    gates = DiffGates(
        torch.optim.SGD(module.parameters(), lr=0.1), module.parameters(), strength, 0.1, groups=groups, seed=1
    )
    for _ in range(3):
        loss_of(module.weight, module.bias).backward()
        gates.gather_gradients()
        gates._optimizer.step()
    drawn = [torch.cat([z for _, z in gates._drawn_gates(index)]) for index in range(2)]
    loss_of(module.weight, module.bias).backward()
    gates.gather_gradients()
    thetas, penalty, leaves = [], torch.zeros(()), []
    for index, gated in enumerate(gates._gated):
        delta = gated.delta.detach().requires_grad_()
        log_alphas = [a.detach().requires_grad_() for a in gated.log_alphas]
        generator = torch.Generator()
        generator.manual_seed(((1 * 1_000_003 + 3) * 1_000_003 + index) % 2**63)
        z, is_open = torch.ones(()), torch.ones(())
        for log_alpha in reversed(log_alphas):  # the tensor's own before those of its entries
            u = torch.rand(log_alpha.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid(u.log() - (1 - u).log() + log_alpha)
            z, is_open = z * (s * 3.0 - 1.5).clamp(0, 1), is_open * torch.sigmoid(log_alpha)
        torch.testing.assert_close(z.detach(), drawn[index])
        thetas.append(gated.base + z * delta)
        penalty = penalty + is_open.sum()
        leaves.append((gated, delta, log_alphas))
    torch.testing.assert_close(thetas[0].detach(), module.weight.detach())
    (loss_of(*thetas) + strength * penalty).backward()
    for gated, delta, log_alphas in leaves:
        torch.testing.assert_close(gated.delta.grad, delta.grad)
        for log_alpha, expected in zip(gated.log_alphas, log_alphas, strict=True):
            torch.testing.assert_close(log_alpha.grad, expected.grad)


def test_a_scalar_and_a_tensor_in_another_memory_format_are_gated():
    weight = nn.Parameter(torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last))
    scalar = nn.Parameter(torch.tensor(2.0))
    gates = DiffGates(torch.optim.SGD([weight, scalar], lr=0.1), [weight, scalar], 0.0, 0.1, groups=True, seed=0)
    base = weight.detach().clone()
    assert all(float(z.min()) == 1 for _, z in gates._drawn_gates(1))
    (weight.square().sum() + scalar.square()).backward()
    gradient = weight.grad.clone()
    gates.gather_gradients()
    drawn = torch.cat([z for _, z in gates._drawn_gates(0)])
    torch.testing.assert_close(gates._gated[0].delta.grad, gradient * drawn)
    gates._optimizer.step()
    gates.write(mean=True)  # all are open yet
    torch.testing.assert_close(weight.detach(), base - 0.1 * gradient * drawn)
    assert float(scalar.detach()) == pytest.approx(2 - 0.1 * 4)


def closed(l0_weight):
    module = net()
    gates = DiffGates(
        torch.optim.Adam(module.parameters(), lr=0.01), module.parameters(), l0_weight, 0.1, groups=False, seed=0
    )
    for _ in range(200):
        loss_of(module.weight, module.bias).backward()
        gates.gather_gradients()
        gates._optimizer.step()
    return sum(int((delta == 0).sum()) for delta in gates.deltas().values())


def test_a_larger_penalty_closes_more_gates():
    assert closed(0.0) < closed(0.05) <= closed(5.0) == 28


def test_a_gate_is_closed_half_open_or_open():
    assert stretched(torch.tensor([-9.0, 0.0, 9.0]).sigmoid()).tolist() == [0.0, 0.0, 1.0]
    assert 0 < float(stretched(torch.tensor(0.2).sigmoid())) < 1


def test_entries_with_closed_gates_come_last_in_the_order_of_their_deltas():
    module = net()
    gates = DiffGates(
        torch.optim.Adam(module.parameters(), lr=0.01), module.parameters(), 0.0, 0.1, groups=False, seed=0
    )
    with torch.no_grad():
        for gated in gates._gated:
            gated.delta.copy_(torch.linspace(-1, 2.3, gated.delta.numel()).view(gated.delta.shape))
            gated.log_alphas[0].fill_(9.0 if gated.parameter is module.bias else -9.0)
        gates._gated[0].log_alphas[0].view(-1)[5] = 0.2  # one half open gate in a tensor of closed ones
    scores, deltas = gates.scores(), gates.deltas()
    weight, delta = scores[id(module.weight)].flatten(), gates._gated[0].delta.abs().flatten()
    assert (deltas[id(module.weight)] != 0).sum() == 1
    assert int(weight.argmax()) == 5
    assert torch.equal(scores[id(module.bias)], deltas[id(module.bias)].abs())
    others = torch.arange(len(weight)) != 5
    assert torch.equal(weight[others].argsort(stable=True), delta[others].argsort(stable=True))
    assert float(weight[others].max()) < min(float(weight[5]), float(scores[id(module.bias)].min()))


def test_at_the_end_the_model_holds_the_kept_deltas_and_adamr_the_base():
    module = net()
    base = [p.detach().clone() for p in module.parameters()]
    optimizer = AdamR(module.parameters(), lr=0.01, delta_decay=0.1)
    gates = DiffGates(optimizer, module.parameters(), 0.0, 0.1, groups=False, seed=0)
    for _ in range(20):
        loss_of(module.weight, module.bias).backward()
        gates.gather_gradients()
        optimizer.step()
    kept = {module.weight: torch.tensor([1, 7, 20]), module.bias: torch.tensor([2])}
    deltas = gates.deltas()
    gates.finish(kept)
    assert optimizer.param_groups[0]["params"] == list(module.parameters())
    for (parameter, positions), start in zip(kept.items(), base, strict=True):
        expected = torch.zeros(parameter.numel()).index_copy(0, positions, deltas[id(parameter)].flatten()[positions])
        assert (expected != 0).sum() == len(positions)
        torch.testing.assert_close(parameter.detach().flatten() - start.flatten(), expected)
        assert torch.equal(optimizer.state[parameter]["pretrained"], start)
        assert float(optimizer.state[parameter]["exp_avg"].abs().sum()) == 0
