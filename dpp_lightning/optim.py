"""AdamR: Adam with decay toward the pre-trained weights, so that what fine-tuning changes stays small enough to prune.

Paper: DARE the Extreme: Revisiting Delta-Parameter Pruning for Fine-Tuned Models (ICLR 2025), Section 4.2 and
Algorithm 1, https://arxiv.org/abs/2410.09344. The decay is divided by the gradient's scale after stable weight decay
(Xie et al., On the Overlooked Pitfalls of Weight Decay, https://arxiv.org/abs/2011.11152).
"""

from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

State = dict[str, Tensor]
PIECE = 2**20  # entries worked on at once on a CPU: temporary tensors this small are reused from its cache


class Batch(NamedTuple):
    """Parameters of one group, device and dtype that have a gradient in this step, with their state."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    foreach: bool

    def entries(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]


class AdamR(Optimizer):
    r"""Adam with decay toward θ0, the values the parameters had when this optimizer was made.

    With g the gradient, m̂ and v̂ Adam's bias-corrected moments, and v̄ the mean of v̂ over all entries of all
    parameters that have a gradient in this step (this step's gradient included, heads included), one step is::

        θ ← θ − lr · delta_decay / √v̄ · (θ − θ0)         norm="l2"
        θ ← θ − lr · delta_decay / √v̄ · sign(θ − θ0)     norm="l1"
        θ ← θ − lr · m̂ / (√v̂ + eps)

    v̄ = 0 counts as 1. With ``delta_decay=0`` this is :class:`torch.optim.Adam`. L2 prepares for random pruning (DARE),
    L1 for magnitude pruning. The decay is not capped: where lr · delta_decay > √v̄ it overshoots θ0, as published.

    θ0 is ``state[p]["pretrained"]``, of p's shape and dtype: it is saved and loaded with the optimizer's state dict, so
    an optimizer made on later weights has the first θ0 again once the state dict is loaded. State is made at once for
    every parameter that requires a gradient; one that is unfrozen later gets it, θ0 included, at its first step.

    Args:
        params: parameters, named parameters or groups. A group may set every option below for itself, and ``new=True``
            for parameters without pre-trained values (a fresh head): no decay, no θ0 kept.
        lr: learning rate, in [0, ∞).
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to √v̂, in [0, ∞).
        delta_decay: strength of the pull toward θ0, in [0, ∞).
        norm: penalty on θ − θ0, "l2" or "l1".
        amsgrad: use the running maximum of v, in v̄ as well.
        foreach: work on lists of tensors at once (None: where all parameters are plain tensors) or one by one.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a setting outside its range, a parameter that is complex or on the meta device, or (when loading) a
            state dict without θ0.
        RuntimeError: in ``step``, a sparse or complex gradient; nothing has been changed then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta_decay: float = 1e-2,
        norm: Literal["l2", "l1"] = "l2",
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "delta_decay": delta_decay, "norm": norm, "new": False}
        defaults |= {"amsgrad": amsgrad, "foreach": foreach, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters' present values become their θ0, unless it says ``new=True``."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for p in group["params"]:
                check_parameter(p)
        except ValueError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            if p.requires_grad:
                self._complete_state(p, group)

    def _complete_state(self, p: Tensor, group: dict[str, Any]) -> State:
        """The state of p: whatever is missing is made, and what p's device and dtype have left behind follows it."""
        state: State = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if not group["new"] and "pretrained" not in state:
            state["pretrained"] = p.detach().clone(memory_format=torch.preserve_format)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone(memory_format=torch.preserve_format)
        if not group["amsgrad"] and "exp_avg_sq_sum" not in state:
            state["exp_avg_sq_sum"] = state["exp_avg_sq"].sum(dtype=sum_dtype(p))
        if (state["exp_avg"].device, state["exp_avg"].dtype) != (p.device, p.dtype):
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(p.device, sum_dtype(p) if name == "exp_avg_sq_sum" else p.dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments, step counts and θ0; a θ0 in ``state_dict`` replaces the one taken at construction."""
        saved: dict[Any, State] = state_dict["state"]
        for group in state_dict["param_groups"]:
            for i in group["params"]:
                if saved.get(i) and not group.get("new", False) and "pretrained" not in saved[i]:
                    raise ValueError(
                        f"the state dict has no 'pretrained' values for parameter {i}, got {sorted(saved[i])}: "
                        "expected one saved by AdamR; to start from such weights, make a new AdamR on them"
                    )
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, p in zip(ids, params, strict=True):
            if "exp_avg_sq_sum" in saved.get(i, {}):  # torch casts state to the parameter's dtype, but for "step"
                self.state[p]["exp_avg_sq_sum"] = saved[i]["exp_avg_sq_sum"].to(p.device, sum_dtype(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; ``closure``, if given, computes the loss anew with gradients, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        sums = [second_moment_sum(batch) for batch in batches]
        root = root_mean(sums, sum(p.numel() for batch in batches for p in batch.params))
        for batch in batches:
            group = batch.group
            pull = 0.0 if group["new"] else group["lr"] * group["delta_decay"] / root
            (update_foreach if batch.foreach else update_single)(batch, pull)
        return loss

    def _batches(self) -> list[Batch]:
        """All parameters with a gradient; every gradient is checked before any state is touched."""
        live = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in live:
            check_gradient(p)
        batches: dict[Any, Batch] = {}
        for group, p in live:
            plain = type(p) in (Tensor, torch.nn.Parameter) and type(p.grad) is Tensor
            key = (id(group), p.device, p.dtype, plain)
            foreach = plain if group["foreach"] is None else group["foreach"]
            batch = batches.setdefault(key, Batch(group, [], [], [], foreach))
            batch.params.append(p)
            batch.grads.append(p.grad)
            batch.states.append(self._complete_state(p, group))
        return list(batches.values())


def second_moment_sum(batch: Batch) -> Tensor:
    """Σ v̂ over a batch, this step's gradient included: a scalar. Counts the step and keeps each Σ v in the state.

    Without amsgrad v is not read: Σ v ← β2 Σ v + (1 − β2) ‖g‖².
    """
    beta2, steps = batch.group["betas"][1], batch.entries("step")
    torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    if batch.group["amsgrad"]:
        pairs = zip(batch.grads, batch.states, strict=True)
        sums = torch.stack([upcoming_max_sum(grad, state, beta2) for grad, state in pairs])
    else:
        kept = batch.entries("exp_avg_sq_sum")
        sums = torch.stack(kept).mul_(beta2).add_(squared_norms(batch.grads), alpha=1 - beta2)
        torch._foreach_copy_(kept, list(sums.unbind()))
    return (sums / sums.new_tensor([1 - beta2 ** step.item() for step in steps])).sum()


def squared_norms(grads: list[Tensor]) -> Tensor:
    """‖g‖² of n gradients of one device and dtype, shape (n,). Gradients in shards are to be summed over ranks here.

    On a CPU large ones row by row first: one float32 sum of 10^7 squares is wrong in the fourth digit.
    """
    dtype = sum_dtype(grads[0])
    parts = []
    for g in grads:
        by_row = g.is_cpu and g.ndim > 1 and g.numel() > 2**17
        parts.append(torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=dtype) if by_row else g)
    return torch.stack(torch._foreach_norm(parts, 2, dtype=dtype)).square()


def upcoming_max_sum(grad: Tensor, state: State, beta2: float) -> Tensor:
    """Σ of what amsgrad's running maximum of v will be after this step; changes nothing."""
    total = torch.zeros((), dtype=sum_dtype(grad), device=grad.device)
    for g, v, top in zip(pieces(grad), pieces(state["exp_avg_sq"]), pieces(state["max_exp_avg_sq"]), strict=True):
        v_next = v.mul(beta2).addcmul_(g, g, value=1 - beta2)
        total += torch.maximum(v_next, top).sum(dtype=total.dtype)
    return total


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of about PIECE entries, cut along the first dimension; x itself where it is small or not on a CPU."""
    return x.split(max(1, PIECE * x.shape[0] // x.numel())) if x.is_cpu and x.numel() > PIECE else (x,)


def root_mean(sums: list[Tensor], entries: int) -> float:
    """√v̄ from sums of v̂ and the number of entries summed; 1 where v̄ is 0. The step's only wait for a device."""
    if entries == 0:
        return 1.0
    total: float = torch.stack([v.to(sums[0].device) for v in sums]).sum().item()
    return (total / entries) ** 0.5 or 1.0


def update_single(batch: Batch, pull: float) -> None:
    """The update as the paper writes it, one parameter at a time; ``pull`` = lr · delta_decay / √v̄."""
    group, (beta1, beta2) = batch.group, batch.group["betas"]
    for p, grad, state in zip(batch.params, batch.grads, batch.states, strict=True):
        g, t = -grad if group["maximize"] else grad, state["step"].item()
        if pull != 0:
            delta = p - state["pretrained"]
            p.sub_(delta if group["norm"] == "l2" else delta.sign_(), alpha=pull)
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["amsgrad"]:
            v = torch.maximum(state["max_exp_avg_sq"], v, out=state["max_exp_avg_sq"])
        denominator = (v.sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])
        p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**t))


def update_foreach(batch: Batch, pull: float) -> None:
    """The same on whole lists: the decay, then torch's own Adam, its fused kernel where the tensors allow it."""
    group, params = batch.group, batch.params
    if pull != 0 and group["norm"] == "l2":
        torch._foreach_lerp_(params, batch.entries("pretrained"), pull)
    elif pull != 0:
        decay_l1(params, batch.entries("pretrained"), pull)
    m, v = batch.entries("exp_avg"), batch.entries("exp_avg_sq")
    v_max = batch.entries("max_exp_avg_sq") if group["amsgrad"] else []
    fused = fusible([*params, *batch.grads, *m, *v, *v_max])
    # torch's function counts this step itself
    counts = list((torch.stack(batch.entries("step")) - 1).to(params[0].device if fused else "cpu").unbind())
    options = {name: group[name] for name in ("lr", "eps", "amsgrad", "maximize")}
    options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "weight_decay": 0.0}
    adam(params, batch.grads, m, v, v_max, counts, foreach=not fused, fused=fused, **options)


def decay_l1(params: list[Tensor], pretrained: list[Tensor], pull: float) -> None:
    """θ ← θ − pull · sign(θ − θ0); on a CPU, where lists bring no speed, piece by piece."""
    lists = [(params, pretrained)]
    if params[0].is_cpu:
        pairs = zip(params, pretrained, strict=True)
        lists = [([x], [y]) for p, base in pairs for x, y in zip(pieces(p), pieces(base), strict=True)]
    for thetas, bases in lists:
        signs = torch._foreach_sub(thetas, bases)
        torch._foreach_sign_(signs)
        torch._foreach_add_(thetas, signs, alpha=-pull)


def fusible(tensors: list[Tensor]) -> bool:
    """Whether torch's fused Adam takes these: it walks memory in order, so all must be contiguous and of one dtype."""
    usable = tensors[0].device.type in ("cpu", "cuda") and len({x.dtype for x in tensors}) == 1
    return usable and all(x.is_contiguous() for x in tensors)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Dtype of sums over x: its own, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def check_settings(group: dict[str, Any]) -> None:
    """Raise ValueError for a setting outside its range."""
    infinity, betas = float("inf"), group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    limits = [(name, group[name], infinity) for name in ("lr", "eps", "delta_decay")]
    for name, value, end in [*limits, ("betas[0]", betas[0], 1.0), ("betas[1]", betas[1], 1.0)]:
        if not (isinstance(value, Real) and 0.0 <= float(value) < end):
            raise ValueError(f"{name} must be a number in [0, {end}), got {value!r}")
    choices = {"norm": ("l2", "l1"), "foreach": (None, True, False)}
    for name, allowed in {**choices, **dict.fromkeys(("amsgrad", "maximize", "new"), (True, False))}.items():
        if group[name] not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group[name]!r}")


def check_parameter(p: Tensor) -> None:
    """Raise ValueError for a parameter whose θ0 or moments cannot be kept."""
    if p.is_complex() or p.is_meta:
        raise ValueError(
            f"AdamR copies real values when it is made, got a parameter of {p.dtype} and shape {tuple(p.shape)} on "
            f"{p.device}: load the model's weights first; optimise torch.view_as_real(p) where p is complex"
        )


def check_gradient(p: Tensor) -> None:
    """Raise RuntimeError for a gradient Adam's update is not defined for."""
    grad = p.grad
    if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
        raise RuntimeError(
            f"AdamR takes dense real gradients, got one of {grad.dtype} and {grad.layout} for a parameter of shape "
            f"{tuple(p.shape)}: build embeddings with sparse=False, or leave it to torch.optim.SparseAdam"
        )
