"""One step of AdamR on lists of parameters: the sum of second moments, the decay toward θ0, Adam's update."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from dpp_lightning.tensors.shards import FSDP1_LAYOUT, reduce_shards

State = dict[str, Tensor]
PIECE = 2**20  # entries worked on at once on a CPU: temporary tensors of this size stay in its cache


class Batch(NamedTuple):
    """The n parameters of one group, device, dtype and layout that have a gradient in this step, with their state.

    Attributes:
        group: the optimizer's parameter group.
        params, grads, states: n each; of a parameter in shards, this rank's.
        foreach: whether the update works on the lists at once.
        layout: see :func:`dpp_lightning.tensors.shards.shard_layout`.
        numel: the number of entries of each whole parameter; under FSDP1, which hides it, of this rank's shard.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    foreach: bool
    layout: Hashable
    numel: list[int]

    def entries(self, name: str) -> list[Tensor]:
        """One entry of the state of every parameter."""
        return [state[name] for state in self.states]

    def present(self) -> "Batch":
        """The batch without the parameters of which this rank holds no entry."""
        indices = [i for i, p in enumerate(self.params) if p.numel()]
        if len(indices) == len(self.params):
            return self
        return self._replace(
            params=[self.params[i] for i in indices],
            grads=[self.grads[i] for i in indices],
            states=[self.states[i] for i in indices],
            numel=[self.numel[i] for i in indices],
        )


def second_moments(batches: list[Batch]) -> list[Tensor]:
    """Σ v̂ over each batch, this step's gradient included, as scalars.

    Counts the step, and updates the Σ v that the state holds for each parameter. Of parameters in shards every entry
    counts once, whatever the number of ranks, by one reduction for each layout; under FSDP1 the sums are this rank's.
    """
    for batch in batches:
        torch._foreach_add_(batch.entries("step"), torch.tensor(1.0), alpha=1.0)
    terms = reduce_shards([moment_terms(batch) for batch in batches], [batch.layout for batch in batches])
    return [moment_sum(batch, reduced) for batch, reduced in zip(batches, terms, strict=True)]


def moment_terms(batch: Batch) -> Tensor:
    """What each parameter's Σ v follows from, on this rank, shape (n,): ‖g‖², or with amsgrad and under FSDP1 Σ v."""
    beta2 = batch.group["betas"][1]
    if batch.group["amsgrad"]:
        pairs = zip(batch.grads, batch.states, strict=True)
        return torch.stack([upcoming_max_sum(grad, state, beta2) for grad, state in pairs])
    norms = squared_norms(batch.grads)
    if batch.layout != FSDP1_LAYOUT:
        return norms
    return torch.stack([v.sum(dtype=norms.dtype) for v in batch.entries("exp_avg_sq")]) * beta2 + norms * (1 - beta2)


def moment_sum(batch: Batch, terms: Tensor) -> Tensor:
    """Σ v̂ over a batch, a scalar, from :func:`moment_terms` added up over all ranks, shape (n,).

    Where the terms are ‖g‖², v is not read: Σ v ← β2 Σ v + (1 − β2) ‖g‖².
    """
    beta2, sums = batch.group["betas"][1], terms
    if not batch.group["amsgrad"] and batch.layout != FSDP1_LAYOUT:
        stored = batch.entries("exp_avg_sq_sum")
        sums = torch.stack(stored).mul_(beta2).add_(terms, alpha=1 - beta2)
        torch._foreach_copy_(stored, list(sums.unbind()))
    return (sums / sums.new_tensor([1 - beta2 ** step.item() for step in batch.entries("step")])).sum()


def squared_norms(grads: list[Tensor]) -> Tensor:
    """‖g‖² of n gradients of one device and dtype, shape (n,); of a gradient in shards, of this rank's shard.

    Large gradients on a CPU are reduced to row norms first: one float32 sum of 10^7 squares has an error in the fourth
    digit.
    """
    dtype = sum_dtype(grads[0])
    vectors = []
    for g in grads:
        by_row = g.is_cpu and g.ndim > 1 and g.numel() > 2**17
        vectors.append(torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=dtype) if by_row else g)
    return torch.stack(torch._foreach_norm(vectors, 2, dtype=dtype)).square()


def upcoming_max_sum(grad: Tensor, state: State, beta2: float) -> Tensor:
    """The sum, a scalar, of what amsgrad's running maximum of v will be after this step; changes nothing."""
    total = torch.zeros((), dtype=sum_dtype(grad), device=grad.device)
    for g, v, top in zip(pieces(grad), pieces(state["exp_avg_sq"]), pieces(state["max_exp_avg_sq"]), strict=True):
        v_next = v.mul(beta2).addcmul_(g, g, value=1 - beta2)
        total += torch.maximum(v_next, top).sum(dtype=total.dtype)
    return total


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of about ``PIECE`` entries, cut along the first dimension; x itself where it is small or not on a CPU."""
    return x.split(max(1, PIECE * x.shape[0] // x.numel())) if x.is_cpu and x.numel() > PIECE else (x,)


def root_mean(sums: list[Tensor], counts: list[int], fsdp1_totals: tuple[Tensor, Tensor] | None = None) -> float:
    """√v̄ from sums of v̂ and the numbers of entries summed; 1 where v̄ is 0. The step's only wait for a device.

    Args:
        sums: Σ v̂ of each batch, scalars.
        counts: the number of entries in each sum.
        fsdp1_totals: sum and number of entries, scalars, of all parameters that FSDP1 holds in shards.
    """
    scalars = [*sums, *(fsdp1_totals or ())]
    if not scalars:
        return 1.0
    numbers: list[float] = torch.stack([x.to(scalars[0].device) for x in scalars]).tolist()
    count = sum(counts) + (numbers.pop() if fsdp1_totals else 0)
    return (sum(numbers) / count) ** 0.5 or 1.0 if count else 1.0


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
    """The same update on whole lists: the decay, then torch's own Adam, with its fused kernel where possible."""
    group, params = batch.group, batch.params
    if pull != 0 and group["norm"] == "l2":
        decay_l2(params, batch.entries("pretrained"), pull)
    elif pull != 0:
        decay_l1(params, batch.entries("pretrained"), pull)
    m, v = batch.entries("exp_avg"), batch.entries("exp_avg_sq")
    v_max = batch.entries("max_exp_avg_sq") if group["amsgrad"] else []
    fused = fusible([*params, *batch.grads, *m, *v, *v_max])
    # torch's function counts this step itself, and second_moments has counted it already
    counts = list((torch.stack(batch.entries("step")) - 1).to(params[0].device if fused else "cpu").unbind())
    options = {name: group[name] for name in ("lr", "eps", "amsgrad", "maximize")}
    options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "weight_decay": 0.0}
    adam(params, batch.grads, m, v, v_max, counts, foreach=not fused, fused=fused, **options)


def decay_l2(params: list[Tensor], pretrained: list[Tensor], pull: float) -> None:
    """θ ← θ + pull · (θ0 − θ), in place; a θ0 of another dtype is cast one parameter at a time, on a CPU in pieces."""
    if all(base.dtype == p.dtype for p, base in zip(params, pretrained, strict=True)):
        torch._foreach_lerp_(params, pretrained, pull)
        return
    for p, base in zip(params, pretrained, strict=True):
        for x, y in zip(pieces(p), pieces(base), strict=True):
            torch._foreach_lerp_([x], [y.to(x.dtype)], pull)


def decay_l1(params: list[Tensor], pretrained: list[Tensor], pull: float) -> None:
    """θ ← θ − pull · sign(θ − θ0), in place; in pieces on a CPU, where working on lists is not faster."""
    lists = [(params, pretrained)]
    if params[0].is_cpu:
        pairs = zip(params, pretrained, strict=True)
        lists = [([x], [y]) for p, base in pairs for x, y in zip(pieces(p), pieces(base), strict=True)]
    for thetas, bases in lists:
        signs = torch._foreach_sub(thetas, bases)
        torch._foreach_sign_(signs)
        torch._foreach_add_(thetas, signs, alpha=-pull)


def fusible(tensors: list[Tensor]) -> bool:
    """Whether torch's fused Adam takes these tensors: all must be contiguous and of one dtype."""
    usable = tensors[0].device.type in ("cpu", "cuda") and len({x.dtype for x in tensors}) == 1
    return usable and all(x.is_contiguous() for x in tensors)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: that of x, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
