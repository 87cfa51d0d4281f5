"""Diff pruning: a delta with a gate for each entry, learned with a penalty on the expected number of open gates.

Paper: Guo, Rush and Kim, Parameter-Efficient Transfer Learning with Diff Pruning, https://arxiv.org/abs/2012.07463. The
gates are hard-concrete (Louizos et al., https://arxiv.org/abs/1712.01312).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam, Optimizer

from dpp_lightning.optim.kept_parameters import check_by_entry

LOW, HIGH = -1.5, 1.5  # l and r, between which a gate is stretched before it is cut to [0, 1]
_OPEN = 5.0  # log alpha at the start: all gates are open


@dataclass(frozen=True)
class _Gated:
    """A parameter θ of the model with its base θ0, the delta w that is trained, and log alpha of its gates."""

    parameter: Tensor
    base: Tensor
    delta: Parameter
    log_alphas: list[Parameter]  # of the entries, and with groups of the tensor


class DiffGates:
    """Trains θ = θ0 + z ⊙ w with gates z in [0, 1] in place of θ, with λ times the expected number of open gates.

    The optimizer gets w in the place of θ; log alpha has an Adam of its own. Before each step gradients are taken from
    θ (:meth:`gather_gradients`); after each step, by a hook of the optimizer, gates are drawn anew, by seed and step
    alone, and θ is written. This takes five further numbers an entry: θ0, w, log
    alpha and its two moments.

    Args:
        optimizer: made on the model's parameters; one that treats each entry by itself.
        parameters: of the model, those whose delta is gated; others are trained as they are.
        l0_weight: λ, on each entry that is expected to be open, in [0, ∞).
        gate_lr: learning rate of log alpha.
        groups: a gate for each tensor beside those of its entries.
        seed: of the gates, an integer >= 0.

    Raises:
        ValueError: the optimizer holds none of these parameters, or does not treat each entry by itself.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], l0_weight: float, gate_lr: float, *, groups: bool,
        seed: int,
    ) -> None:  # fmt: skip
        check_by_entry(optimizer)
        self._optimizer, self._l0_weight, self._seed, self._step = optimizer, l0_weight, seed, 0
        self._gated: list[_Gated] = []
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

    def _gates(self, index: int) -> Tensor:
        """Gates of one parameter, drawn by seed, step and parameter; differentiable in log alpha."""
        gated = self._gated[index]
        generator = torch.Generator(gated.base.device)
        generator.manual_seed(((self._seed * 1_000_003 + self._step) * 1_000_003 + index) % 2**63)
        gates = torch.ones((), device=gated.base.device)
        for log_alpha in gated.log_alphas:
            u = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device).clamp(1e-6, 1 - 1e-6)
            gates = gates * stretched(torch.logit(u) + log_alpha)
        return gates

    def gather_gradients(self) -> None:
        """Gradients of w and log alpha from those of θ, which are let go."""
        for index, gated in enumerate(self._gated):
            gradient, gated.parameter.grad = gated.parameter.grad, None
            with torch.enable_grad():
                gates, expected = self._gates(index), torch.ones((), device=gated.base.device)
                for log_alpha in gated.log_alphas:
                    expected = expected * torch.sigmoid(log_alpha)  # log(-l / r) is 0
                objective = self._l0_weight * expected.sum()
                if gradient is not None:
                    objective = objective + (gradient.float() * gated.delta.detach().float() * gates).sum()
                for log_alpha, found in zip(
                    gated.log_alphas, torch.autograd.grad(objective, gated.log_alphas), strict=True
                ):
                    log_alpha.grad = found
            gated.delta.grad = None if gradient is None else gradient * gates.detach().to(gradient.dtype)

    def _after_step(self) -> None:
        self._gate_optimizer.step()
        self._step += 1
        self.write()

    @torch.no_grad()
    def write(self, *, mean: bool = False) -> None:
        """Write θ into the model, with the gates that are drawn for this step, or the mean ones for an evaluation."""
        for index, gated in enumerate(self._gated):
            gates = self._mean_gates(gated) if mean else self._gates(index)
            gated.parameter.copy_(gated.base + gates * gated.delta)

    @staticmethod
    def _mean_gates(gated: _Gated) -> Tensor:
        gates = torch.ones((), device=gated.base.device)
        for log_alpha in gated.log_alphas:
            gates = gates * stretched(log_alpha.detach())
        return gates

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the model whose delta is gated."""
        return [gated.parameter for gated in self._gated]

    def deltas(self) -> dict[int, Tensor]:
        """Identity of each parameter of the model to its delta with mean gates, of its shape."""
        return {id(g.parameter): (self._mean_gates(g) * g.delta).detach() for g in self._gated}

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


def stretched(logit: Tensor) -> Tensor:
    """A hard-concrete gate: the logistic function stretched to (l, r) and cut to [0, 1]."""
    return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)
