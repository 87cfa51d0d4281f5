"""One step of AdamR on lists of parameters: the sum of second moments, the decay toward θ0, Adam's update."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from dpp_lightning.tensors.shards import FSDP1_LAYOUT, reduce_shards

State = dict[str, Tensor]
PIECE = 2**20  # entries worked on at once on a CPU: temporary tensors of this size stay in its cache
LARGE = 2**16  # entries from which a call of a compiled kernel is worth its overhead


class Batch(NamedTuple):
    """The n parameters of one group, device, dtype and layout that have a gradient in this step, with their state.

    Attributes:
        group: the optimizer's parameter group.
        params, grads, states: n each; of a parameter in shards, this rank's.
        foreach: whether the update works on the lists at once.
        layout: see :func:`dpp_lightning.tensors.shards.shard_layout`.
        numel: the number of entries of each whole parameter; under FSDP1, which hides it, of this rank's shard.
        on_device: whether nothing may wait for a device in this step, so that all numbers are in tensors.
        compiled: whether large parameters are updated by a compiled kernel.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    foreach: bool
    layout: Hashable
    numel: list[int]
    on_device: bool = False
    compiled: bool = False

    def entries(self, name: str) -> list[Tensor]:
        """One entry of the state of every parameter."""
        return [state[name] for state in self.states]

    def present(self) -> "Batch":
        """The batch without the parameters of which this rank holds no entry."""
        return self.chosen([i for i, p in enumerate(self.params) if p.numel()])

    def chosen(self, indices: list[int]) -> "Batch":
        """The batch of some of its parameters."""
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
        counts = batch.entries("step")
        torch._foreach_add_(counts, torch.ones((), device=counts[0].device), alpha=1.0)
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
    return (sums / bias_corrections(batch, beta2).to(sums.device, sums.dtype)).sum()


def bias_corrections(batch: Batch, beta: float) -> Tensor:
    """1 − beta^t of each parameter's count of steps t, float64 and on the counts' device, shape (n,)."""
    return 1 - beta ** torch.stack(batch.entries("step")).double()


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


def root_mean_on_device(
    sums: list[Tensor], counts: list[int], fsdp1_totals: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The number of :func:`root_mean` as a scalar in float64, for which nothing waits."""
    scalars = [*sums, *(fsdp1_totals[:1] if fsdp1_totals else ())]
    if not scalars:
        return torch.ones((), dtype=torch.float64)
    total = torch.stack([x.to(scalars[0].device) for x in scalars]).double().sum()
    root = (total / (sum(counts) + (fsdp1_totals[1] if fsdp1_totals else 0))).sqrt()
    return torch.where(total == 0, torch.ones_like(root), root)


def update(batch: Batch, pull: float | Tensor) -> None:
    """Adam's update and the decay; ``pull`` = lr · delta_decay / √v̄, a scalar tensor where nothing may wait for it."""
    if torch.compiler.is_compiling():
        update_traced(batch, pull)
    elif batch.compiled and isinstance(pull, float):
        update_compiled(batch, pull)
    elif batch.foreach:
        update_foreach(batch, pull)
    elif isinstance(pull, Tensor) or batch.on_device:
        for i in range(len(batch.params)):
            update_traced(batch.chosen([i]), pull)
    else:
        update_single(batch, float(pull))


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
        p.addcdiv_(m, denominator, value=-float(group["lr"]) / (1 - beta1**t))


def update_foreach(batch: Batch, pull: float | Tensor) -> None:
    """The same update on whole lists: the decay, then torch's own Adam, with its fused kernel where possible.

    A ``pull`` in a tensor stays on the device, with the count of steps and the learning rate.
    """
    group, params = batch.group, batch.params
    if isinstance(pull, Tensor):
        decay_on_device(params, batch.entries("pretrained"), pull, group["norm"])
    elif pull != 0 and group["norm"] == "l2":
        decay_l2(params, batch.entries("pretrained"), pull)
    elif pull != 0:
        decay_l1(params, batch.entries("pretrained"), pull)
    m, v = batch.entries("exp_avg"), batch.entries("exp_avg_sq")
    v_max = batch.entries("max_exp_avg_sq") if group["amsgrad"] else []
    fused = fusible([*params, *batch.grads, *m, *v, *v_max])
    # torch's function counts this step itself, and second_moments has counted it already
    counts = torch.stack(batch.entries("step")) - 1
    counts = counts.to(params[0].device) if fused else counts if batch.on_device else counts.cpu()
    options = {name: group[name] for name in ("lr", "eps", "amsgrad", "maximize")}
    if not batch.on_device or (params[0].is_cpu and not fused):
        options["lr"] = float(group["lr"])  # torch's lists take no tensor there
    options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "weight_decay": 0.0}
    options |= {"foreach": not fused, "fused": fused, "capturable": batch.on_device and params[0].device.type != "cpu"}
    adam(params, batch.grads, m, v, v_max, list(counts.unbind()), **options)


def update_traced(batch: Batch, pull: float | Tensor) -> None:
    """The same update with no number outside a tensor, for a compiler, or for a device that nothing waits for.

    Args:
        batch: its group may have the learning rate in a tensor.
        pull: a scalar, or 0.0 for no decay.
    """
    group, (beta1, beta2) = batch.group, batch.group["betas"]
    roots = scalars_like(batch.params[0], bias_corrections(batch, beta2).rsqrt())
    steps = scalars_like(batch.params[0], -group["lr"] / bias_corrections(batch, beta1))
    pulls = None
    if isinstance(pull, Tensor):
        pulls = scalars_like(batch.params[0], -pull.expand(len(batch.params)))
    lists = {name: batch.entries(name) for name in state_names(group, decays=pulls is not None)}
    adamr_lists(batch.params, batch.grads, lists, roots, steps, pulls, settings_of(group))


def update_compiled(batch: Batch, pull: float) -> None:
    """The same update by a compiled kernel for large parameters; small and strided ones as :func:`update_foreach`.

    The kernel reads and writes every entry once, where the decay and Adam's update in turn read the parameters twice.
    """
    names, settings = state_names(batch.group, decays=pull != 0), settings_of(batch.group)
    rows = [
        [p, g, *(s[name] for name in names)] for p, g, s in zip(batch.params, batch.grads, batch.states, strict=True)
    ]
    large = [row[0].numel() >= LARGE and all(x.is_contiguous() for x in row) for row in rows]
    rest = batch.chosen([i for i, is_large in enumerate(large) if not is_large])
    if rest.params:
        update_foreach(rest, pull)
    for row, state, is_large in zip(rows, batch.states, large, strict=True):
        if is_large:
            t, (beta1, beta2) = state["step"].item(), batch.group["betas"]
            rates = ((1 - beta2**t) ** -0.5, -float(batch.group["lr"]) / (1 - beta1**t), -pull)
            root, step, minus_pull = torch.tensor(rates, dtype=sum_dtype(row[0]), device=row[0].device).unbind()
            p, g, *entries = ([x.view(-1)] for x in row)
            lists = dict(zip(names, entries, strict=True))
            compiled_lists()(p, g, lists, [root], [step], [minus_pull] if pull != 0 else None, settings)


@cache
def compiled_lists() -> Callable[..., None]:
    """:func:`adamr_lists`, compiled for tensors of any length."""
    return torch.compile(adamr_lists, fullgraph=True, dynamic=True)


class Settings(NamedTuple):
    """Of a group, what one compiled kernel is for."""

    betas: tuple[float, float]
    eps: float
    l1: bool
    maximize: bool


def settings_of(group: dict[str, Any]) -> Settings:
    """Of a parameter group."""
    return Settings(tuple(group["betas"]), group["eps"], group["norm"] == "l1", group["maximize"])


def state_names(group: dict[str, Any], *, decays: bool) -> list[str]:
    """The entries of the state that :func:`adamr_lists` takes."""
    optional = [("max_exp_avg_sq", group["amsgrad"]), ("pretrained", decays)]
    return ["exp_avg", "exp_avg_sq", *(name for name, used in optional if used)]


def adamr_lists(
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    roots: list[Tensor],
    steps: list[Tensor],
    pulls: list[Tensor] | None,
    settings: Settings,
) -> None:
    """The update on lists of n, in place, with temporary lists that a compiler never makes; narrow dtypes are widened.

    Args:
        params, grads: n each.
        state: the entries of :func:`state_names`, n each.
        roots, steps: 1 / √(1 − β2^t) and −lr / (1 − β1^t) of each parameter, scalars of the dtype of their sums.
        pulls: −lr · delta_decay / √v̄ likewise; None for no decay.
        settings: of the group.
    """
    beta1, beta2 = settings.betas
    theta, g = widened(params), widened(grads)
    g = list(torch._foreach_neg(g)) if settings.maximize else g
    m = torch._foreach_lerp(widened(state["exp_avg"]), g, 1 - beta1)
    v = torch._foreach_addcmul(torch._foreach_mul(widened(state["exp_avg_sq"]), beta2), g, g, value=1 - beta2)
    updated = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in state:
        v = updated["max_exp_avg_sq"] = torch._foreach_maximum(widened(state["max_exp_avg_sq"]), v)
    denominators = torch._foreach_add(torch._foreach_mul(torch._foreach_sqrt(v), roots), settings.eps)
    changes = torch._foreach_mul(torch._foreach_div(m, denominators), steps)
    if pulls is not None:
        base = [x.to(p.dtype) for x, p in zip(state["pretrained"], theta, strict=True)]
        deltas = torch._foreach_sub(theta, base)
        directions = torch._foreach_sign(deltas) if settings.l1 else deltas
        changes = torch._foreach_add(changes, torch._foreach_mul(directions, pulls))
    torch._foreach_copy_(params, torch._foreach_add(theta, changes))
    for name, values in updated.items():
        torch._foreach_copy_(state[name], values)


def widened(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the dtype of their sums; those that have it already themselves."""
    return [x.to(sum_dtype(x)) for x in tensors]


def scalars_like(x: Tensor, numbers: Tensor) -> list[Tensor]:
    """n numbers, shape (n,), as scalars of x's dtype on its device."""
    return list(numbers.to(x.device, x.dtype).unbind())


def decay_on_device(params: list[Tensor], pretrained: list[Tensor], pull: Tensor, norm: str) -> None:
    """:func:`decay_l2` and :func:`decay_l1` with a ``pull`` that is a scalar tensor, one parameter at a time."""
    for p, base in zip(params, pretrained, strict=True):
        wide = p.to(sum_dtype(p))
        weight = pull.to(p.device, wide.dtype)
        if norm == "l2":
            wide.lerp_(base.to(wide.dtype), weight)
        else:
            wide.sub_((wide - base).sign_().mul_(weight))
        if wide is not p:
            p.copy_(wide)


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
