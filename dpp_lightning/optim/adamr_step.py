"""One step of AdamR on lists of parameters: the sum of second moments, the decay toward θ0, Adam's update."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from dpp_lightning.tensors.shards import FSDP1_LAYOUT, reduce_shards

State = dict[str, Tensor]
PIECE = 2**20  # entries worked on at once on a CPU: temporary tensors this small are reused from its cache


class Batch(NamedTuple):
    """Parameters of one group, device, dtype and way of sharing that have a gradient in this step, with their state.

    Of what is in shards these are this rank's parts. ``numel`` counts the entries of the whole parameters, and under
    FSDP1, which does not tell, those of the parts.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    foreach: bool
    shared: Hashable
    numel: list[int]

    def entries(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]

    def present(self) -> "Batch":
        """Without the parameters of which this rank holds nothing."""
        here = [i for i, p in enumerate(self.params) if p.numel()]
        if len(here) == len(self.params):
            return self
        return self._replace(
            params=[self.params[i] for i in here],
            grads=[self.grads[i] for i in here],
            states=[self.states[i] for i in here],
            numel=[self.numel[i] for i in here],
        )


def second_moments(batches: list[Batch]) -> list[Tensor]:
    """Σ v̂ over each batch, this step's gradient included: scalars. Counts the step and keeps each Σ v in the state.

    Of parameters in shards each entry counts once, whatever the number of ranks, by one reduction for each mesh; under
    FSDP1 the sums are this rank's.
    """
    for batch in batches:
        torch._foreach_add_(batch.entries("step"), torch.tensor(1.0), alpha=1.0)
    parts = reduce_shards([moment_parts(batch) for batch in batches], [batch.shared for batch in batches])
    return [moment_sum(batch, whole) for batch, whole in zip(batches, parts, strict=True)]


def moment_parts(batch: Batch) -> Tensor:
    """Of each parameter what its Σ v is made from, on this rank, (params,): ‖g‖²; with amsgrad and under FSDP1 Σ v."""
    beta2 = batch.group["betas"][1]
    if batch.group["amsgrad"]:
        pairs = zip(batch.grads, batch.states, strict=True)
        return torch.stack([upcoming_max_sum(grad, state, beta2) for grad, state in pairs])
    norms = squared_norms(batch.grads)
    if batch.shared != FSDP1_LAYOUT:
        return norms
    return torch.stack([v.sum(dtype=norms.dtype) for v in batch.entries("exp_avg_sq")]) * beta2 + norms * (1 - beta2)


def moment_sum(batch: Batch, whole: Tensor) -> Tensor:
    """Σ v̂ over a batch, from what :func:`moment_parts` gave on all ranks. Where it gave ‖g‖², v is not read:
    Σ v ← β2 Σ v + (1 − β2) ‖g‖²."""
    beta2, sums = batch.group["betas"][1], whole
    if not batch.group["amsgrad"] and batch.shared != FSDP1_LAYOUT:
        kept = batch.entries("exp_avg_sq_sum")
        sums = torch.stack(kept).mul_(beta2).add_(whole, alpha=1 - beta2)
        torch._foreach_copy_(kept, list(sums.unbind()))
    return (sums / sums.new_tensor([1 - beta2 ** step.item() for step in batch.entries("step")])).sum()


def squared_norms(grads: list[Tensor]) -> Tensor:
    """‖g‖² of n gradients of one device and dtype, shape (n,); of what is in shards, of this rank's parts.

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


def root_mean(sums: list[Tensor], entries: list[int], flat: tuple[Tensor, Tensor] | None = None) -> float:
    """√v̄ from sums of v̂ and the numbers of entries summed; 1 where v̄ is 0. The step's only wait for a device.

    Args:
        sums: scalars.
        entries: of each.
        flat: sum and number of entries of what FSDP1 shares out.
    """
    scalars = [*sums, *(flat or ())]
    if not scalars:
        return 1.0
    numbers: list[float] = torch.stack([x.to(scalars[0].device) for x in scalars]).tolist()
    count = sum(entries) + (numbers.pop() if flat else 0)
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
    """The same on whole lists: the decay, then torch's own Adam, its fused kernel where the tensors allow it."""
    group, params = batch.group, batch.params
    if pull != 0 and group["norm"] == "l2":
        decay_l2(params, batch.entries("pretrained"), pull)
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


def decay_l2(params: list[Tensor], pretrained: list[Tensor], pull: float) -> None:
    """θ ← θ + pull · (θ0 − θ); a θ0 of another dtype is cast one parameter at a time, on a CPU piece by piece."""
    if all(base.dtype == p.dtype for p, base in zip(params, pretrained, strict=True)):
        torch._foreach_lerp_(params, pretrained, pull)
        return
    for p, base in zip(params, pretrained, strict=True):
        for x, y in zip(pieces(p), pieces(base), strict=True):
            torch._foreach_lerp_([x], [y.to(x.dtype)], pull)


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
