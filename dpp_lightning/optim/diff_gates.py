"""Diff pruning: a delta with a gate for each entry, learned with a penalty on the expected number of open gates.

Paper: Guo, Rush and Kim, Parameter-Efficient Transfer Learning with Diff Pruning, https://arxiv.org/abs/2012.07463. The
gates are hard-concrete (Louizos et al., https://arxiv.org/abs/1712.01312).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from dpp_lightning.optim.kept_parameters import check_by_entry

LOW, HIGH = -1.5, 1.5  # l and r, between which a gate is stretched before it is cut to [0, 1]
_OPEN = 5.0  # log alpha at the start: all gates are open
_ENTRIES = 2**17  # drawn at a time: what is computed of them stays in a CPU's cache


@dataclass(frozen=True)
class _Gated:
    """A parameter θ of the model with its base θ0, the delta w that is trained, and log alpha of its gates."""

    parameter: Tensor
    base: Tensor
    delta: Parameter
    log_alphas: list[Parameter]  # of the entries, and with groups of the tensor

    def rows(self, tensor: Tensor, rows: slice) -> Tensor:
        """A view of some rows of a tensor of the parameter's shape."""
        return torch.atleast_1d(tensor.detach())[rows]


class DiffGates:
    """Trains θ = θ0 + z ⊙ w with gates z in [0, 1] in place of θ, with λ times the expected number of open gates.

    The optimizer gets w in the place of θ; log alpha has an Adam of its own. Before each step gradients are taken from
    θ (:meth:`gather_gradients`); after each step, by a hook of the optimizer, gates are drawn anew, by seed and step
    alone, and θ is written. This takes five further numbers an entry: θ0, w, log alpha and its two moments.

    Args:
        optimizer: made on the model's parameters; one that treats each entry by itself.
        parameters: of the model, those whose delta is gated; others are trained as they are.
        l0_weight: λ, on each entry that is expected to be open, in [0, ∞).
        gate_lr: learning rate of log alpha.
        groups: a gate for each tensor beside those of its entries.
        seed: of the gates, an integer >= 0.
        untrained: parameters that the optimizer is given no gradients of.

    Raises:
        ValueError: the optimizer holds none of these parameters, or does not treat each entry by itself.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], l0_weight: float, gate_lr: float, *, groups: bool,
        seed: int, untrained: Iterable[Tensor] = (),
    ) -> None:  # fmt: skip
        check_by_entry(optimizer)
        self._optimizer, self._l0_weight, self._seed, self._step = optimizer, l0_weight, seed, 0
        self._gated: list[_Gated] = []
        self._untrained = list(untrained)
        chosen = set(parameters)
        for group in optimizer.param_groups:
            group["params"] = [self._delta_of(p, groups) if p in chosen else p for p in group["params"]]
        if not self._gated:
            raise ValueError(
                f"{type(optimizer).__name__} holds none of the parameters whose delta is gated: return an optimizer of "
                "this module's parameters from configure_optimizers, made anew for each fit"
            )
        self._gate_optimizer = Adam([a for gated in self._gated for a in gated.log_alphas], lr=gate_lr)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._after_step())
        self.write()

    def _delta_of(self, parameter: Tensor, groups: bool) -> Parameter:
        shapes = [parameter.shape, *([torch.Size(())] if groups else [])]
        log_alphas = [Parameter(torch.full(shape, _OPEN, device=parameter.device)) for shape in shapes]
        gated = _Gated(parameter, parameter.detach().clone(), Parameter(torch.zeros_like(parameter)), log_alphas)
        self._gated.append(gated)
        self._move_state(parameter, gated.delta, torch.zeros_like(gated.base))
        return gated.delta

    def _move_state(self, before: Tensor, after: Tensor, pretrained: Tensor) -> None:
        """The optimizer's state of a parameter as at the start, with another θ0, for the parameter that replaces it."""
        state: dict[str, Any] | None = self._optimizer.state.pop(before, None)
        if state is not None:
            zeros = {n: torch.zeros_like(v) if isinstance(v, Tensor) else v for n, v in state.items()}
            self._optimizer.state[after] = zeros | ({"pretrained": pretrained} if "pretrained" in state else {})

    def _draw(self, index: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows of one parameter, with the logistic values s of their gates and, with groups, of the tensor's gate.

        Gates are drawn by seed, step and parameter alone; without groups the tensor's is open.
        """
        gated = self._gated[index]
        generator = torch.Generator(gated.base.device)
        generator.manual_seed(((self._seed * 1_000_003 + self._step) * 1_000_003 + index) % 2**63)
        entries, *group = gated.log_alphas
        of_tensor = torch.ones((), device=gated.base.device)
        for log_alpha in group:
            of_tensor = _logistic(log_alpha.detach(), generator)
        for rows in _slices(gated.base):
            yield rows, _logistic(gated.rows(entries, rows), generator), of_tensor

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Gradients of w and log alpha from those of θ, which are let go."""
        for parameter in self._untrained:
            parameter.grad = None
        for index, gated in enumerate(self._gated):
            gradient, gated.parameter.grad = gated.parameter.grad, None
            for log_alpha in gated.log_alphas:
                log_alpha.grad = torch.zeros_like(log_alpha)
            gated.delta.grad = gradient  # times z, below
            for rows, s, of_tensor in self._draw(index):
                self._gather_rows(gated, rows, s, of_tensor)

    def _gather_rows(self, gated: _Gated, rows: slice, s: Tensor, of_tensor: Tensor) -> None:
        """Gradients of some rows: of w, g z; of log alpha, g w dz/d(log alpha) + λ dP(z > 0)/d(log alpha)."""
        entries, *group = gated.log_alphas
        gate, tensor_gate = stretched(s), stretched(of_tensor)
        is_open = torch.sigmoid(gated.rows(entries, rows))  # P(z > 0): log(-l / r) is 0
        tensor_open = torch.sigmoid(group[0].detach()) if group else torch.ones_like(of_tensor)
        by_gate = None
        if gated.delta.grad is not None:
            gradient = gated.rows(gated.delta.grad, rows)
            by_gate = gradient.float() * gated.rows(gated.delta, rows).float()
            gradient.mul_((gate * tensor_gate).to(gradient.dtype))
        for log_alpha in group:
            assert log_alpha.grad is not None
            log_alpha.grad += self._l0_weight * is_open.sum() * tensor_open * (1 - tensor_open)
            if by_gate is not None:
                log_alpha.grad += (by_gate * gate).sum() * _slope(of_tensor, tensor_gate)
        assert entries.grad is not None
        found = gated.rows(entries.grad, rows)
        torch.addcmul(found, is_open, 1 - is_open, value=self._l0_weight, out=found).mul_(tensor_open)
        if by_gate is not None:
            found.addcmul_(by_gate.mul_(tensor_gate), _slope(s, gate))

    def _after_step(self) -> None:
        self._gate_optimizer.step()
        self._step += 1
        self.write()

    @torch.no_grad()
    def write(self, *, mean: bool = False) -> None:
        """Write θ into the model, with the gates that are drawn for this step, or the mean ones for an evaluation."""
        for index, gated in enumerate(self._gated):
            for rows, gates in self._mean_gates(gated) if mean else self._drawn_gates(index):
                theta = (gates * gated.rows(gated.delta, rows)).add_(gated.rows(gated.base, rows))
                gated.rows(gated.parameter, rows).copy_(theta)

    def _drawn_gates(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        for rows, s, of_tensor in self._draw(index):
            yield rows, stretched(s).mul_(stretched(of_tensor))

    @staticmethod
    def _mean_gates(gated: _Gated) -> Iterator[tuple[slice, Tensor]]:
        entries, *group = (a.detach() for a in gated.log_alphas)
        for rows in _slices(gated.base):
            gates = stretched(torch.sigmoid(gated.rows(entries, rows)))
            for log_alpha in group:
                gates.mul_(stretched(torch.sigmoid(log_alpha)))
            yield rows, gates

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the model whose delta is gated."""
        return [gated.parameter for gated in self._gated]

    def deltas(self) -> dict[int, Tensor]:
        """Identity of each parameter of the model to its delta with mean gates, of its shape."""
        found = {}
        for gated in self._gated:
            precise = torch.promote_types(gated.delta.dtype, torch.float32)
            found[id(gated.parameter)] = delta = torch.empty_like(gated.base, dtype=precise)
            for rows, gates in self._mean_gates(gated):
                torch.mul(gates, gated.rows(gated.delta, rows), out=gated.rows(delta, rows))
        return found

    @torch.no_grad()
    def scores(self) -> dict[int, Tensor]:
        """Identity of each parameter to the scores of its entries: |z ⊙ w|, and below all of these |w| where z = 0.

        A tensor all of whose gates are closed still has an order, in a mask that counts its entries by themselves.
        """
        gated, ungated = self.deltas(), {id(g.parameter): g.delta.detach() for g in self._gated}
        least = min((float(d[d > 0].min()) for d in (d.abs() for d in gated.values()) if d.any()), default=1.0)
        largest = max(float(delta.abs().max()) for delta in ungated.values() if delta.numel())
        scale = least / (2 * largest) if largest else 0.0
        return {key: torch.where(d == 0, ungated[key].abs() * scale, d.abs()) for key, d in gated.items()}

    @torch.no_grad()
    def finish(self, positions: dict[Tensor, Tensor]) -> None:
        """Give the optimizer the model's parameters back, which hold the delta at some positions and else the base.

        Args:
            positions: parameter to the flat positions of the entries that keep their delta.
        """
        self._hook.remove()
        deltas = self.deltas()
        by_delta = {gated.delta: gated for gated in self._gated}
        for group in self._optimizer.param_groups:
            group["params"] = [by_delta[p].parameter if p in by_delta else p for p in group["params"]]
        for gated in self._gated:
            kept = torch.zeros(gated.base.numel(), dtype=torch.bool, device=gated.base.device)
            kept[positions[gated.parameter].to(kept.device)] = True
            delta = deltas[id(gated.parameter)].where(kept.view(gated.base.shape), torch.zeros_like(gated.base))
            gated.parameter.copy_(torch.where(delta == 0, gated.base, gated.base + delta))
            self._move_state(gated.delta, gated.parameter, gated.base)

    def release(self) -> None:
        """End the writing after each step; the optimizer keeps its parameters."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Bases, deltas, log alphas with their moments, and the step."""
        tensors = [{"base": g.base, "delta": g.delta.detach(), "log_alphas": [a.detach() for a in g.log_alphas]}
                   for g in self._gated]  # fmt: skip
        return {"step": self._step, "tensors": tensors, "gate_optimizer": self._gate_optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave, of the same parameters."""
        self._step = state["step"]
        for gated, saved in zip(self._gated, state["tensors"], strict=True):
            gated.base.copy_(saved["base"])
            gated.delta.copy_(saved["delta"])
            for log_alpha, value in zip(gated.log_alphas, saved["log_alphas"], strict=True):
                log_alpha.copy_(value)
        self._gate_optimizer.load_state_dict(state["gate_optimizer"])
        self.write()


def _slices(tensor: Tensor) -> Iterator[slice]:
    """Rows of a tensor, as many at a time as a CPU's cache takes; on a device that has none to mind, all."""
    count = tensor.shape[0] if tensor.ndim else 1
    step = max(_ENTRIES * count // max(tensor.numel(), 1), 1) if tensor.device.type == "cpu" else max(count, 1)
    for start in range(0, count, step):
        yield slice(start, start + step)


def _logistic(log_alpha: Tensor, generator: torch.Generator) -> Tensor:
    """The logistic function of log alpha + logit(u), drawn for each entry: u / (u + (1 - u) exp(-log alpha))."""
    u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device).clamp_(1e-6, 1 - 1e-6)
    return u / torch.addcmul(u, 1 - u, torch.exp(-log_alpha))


def stretched(s: Tensor) -> Tensor:
    """A hard-concrete gate z of its logistic value: stretched from (0, 1) to (l, r) and cut to [0, 1]."""
    return (s * (HIGH - LOW)).add_(LOW).clamp_(0, 1)


def _slope(s: Tensor, gate: Tensor) -> Tensor:
    """dz/d(log alpha) = (r - l) s (1 - s), and 0 where the gate is cut."""
    return (s * (1 - s)).mul_((HIGH - LOW) * ((gate > 0) & (gate < 1)))
