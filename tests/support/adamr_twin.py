"""AdamR as its paper writes it, slow and plain: what the optimizer is compared with.

As in the released code θ0 is copied anew and sent to each parameter's device in every step, parameters are visited one by
one, and v̄ takes a second pass over all second moments.
"""

import copy

import torch


class AdamRTwin:
    """Algorithm 1 of DARE the Extreme over ``groups``: dicts with params, lr, betas, eps, delta_decay, norm, amsgrad, new."""

    def __init__(self, groups: list[dict]) -> None:
        self.groups = []
        self.pretrained: dict[int, torch.Tensor] = {}
        self.moments: dict[int, dict] = {}
        for group in groups:
            self.add(group)

    def add(self, group: dict) -> None:
        defaults = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "delta_decay": 1e-2, "norm": "l2"}
        self.groups.append({**defaults, "amsgrad": False, "maximize": False, "new": False, **group})
        for p in group["params"]:
            self.pretrained[id(p)] = p.detach().clone()

    def visit(self):
        return [(group, p) for group in self.groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        theta0 = copy.deepcopy(self.pretrained)
        for group, p in self.visit():
            self.update_moments(group, p)
        total, entries = 0.0, 0
        for group, p in self.visit():
            total += self.v_hat(group, p).sum().item()
            entries += p.numel()
        v_bar = total / entries if entries else 0.0
        divisor = v_bar**0.5 if v_bar != 0 else 1.0
        for group, p in self.visit():
            if not group["new"]:
                delta = p - theta0[id(p)].to(p.device)
                change = delta if group["norm"] == "l2" else torch.sign(delta)
                p.copy_(p - group["lr"] * group["delta_decay"] / divisor * change)
            m_hat = self.moments[id(p)]["m"] / (1 - group["betas"][0] ** self.moments[id(p)]["t"])
            p.copy_(p - group["lr"] * m_hat / (torch.sqrt(self.v_hat(group, p)) + group["eps"]))

    def update_moments(self, group: dict, p: torch.Tensor) -> None:
        zero = {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p), "max": torch.zeros_like(p)}
        state = self.moments.setdefault(id(p), zero) if id(p) not in self.moments else self.moments[id(p)]
        beta1, beta2 = group["betas"]
        grad = -p.grad if group["maximize"] else p.grad
        state["t"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * grad
        state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
        if group["amsgrad"]:
            state["max"] = torch.maximum(state["max"], state["v"])

    def v_hat(self, group: dict, p: torch.Tensor) -> torch.Tensor:
        state = self.moments[id(p)]
        return state["max" if group["amsgrad"] else "v"] / (1 - group["betas"][1] ** state["t"])
