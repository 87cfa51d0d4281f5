"""AdamR: Adam with decay toward the pre-trained weights, so that what fine-tuning changes stays small enough to prune.

Paper: DARE the Extreme: Revisiting Delta-Parameter Pruning for Fine-Tuned Models (ICLR 2025), Section 4.2 and
Algorithm 1, https://arxiv.org/abs/2410.09344. The decay is divided by the gradient's scale after stable weight decay
(Xie et al., On the Overlooked Pitfalls of Weight Decay, https://arxiv.org/abs/2011.11152).
"""

from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from dpp_lightning.optim.adamr_step import (
    Batch,
    State,
    root_mean,
    root_mean_on_device,
    second_moments,
    sum_dtype,
    update,
)
from dpp_lightning.tensors.shards import (
    FSDP1_LAYOUT,
    full_sum,
    is_fsdp1_shard,
    local_tensor,
    shard_layout,
    sum_over_ranks,
)


class AdamR(Optimizer):
    r"""Adam with decay toward θ0, the values the parameters had when this optimizer was made.

    With g the gradient, m̂ and v̂ Adam's bias-corrected moments, and v̄ the mean of v̂ over all entries of all
    parameters that have a gradient in this step (this step's gradient included, heads included), one step is::

        θ ← θ − lr · delta_decay / √v̄ · (θ − θ0)         norm="l2"
        θ ← θ − lr · delta_decay / √v̄ · sign(θ − θ0)     norm="l1"
        θ ← θ − lr · m̂ / (√v̂ + eps)

    v̄ = 0 counts as 1. With ``delta_decay=0`` this is :class:`torch.optim.Adam`. L2 prepares for random pruning (DARE),
    L1 for magnitude pruning. The decay is not capped: where lr · delta_decay > √v̄ it overshoots θ0, as published.

    θ0 is ``state[p]["pretrained"]``, of p's shape and, unless ``pretrained_dtype`` narrows it, p's dtype: it is saved
    and loaded with the optimizer's state dict, so an optimizer made on later weights has the first θ0 again once the
    state dict is loaded. State is made at once for every parameter that requires a gradient; one that is unfrozen later
    gets it, θ0 included, at its first step.

    Args:
        params: parameters, named parameters or groups. A group may set every option below for itself, and ``new=True``
            for parameters without pre-trained values (a fresh head): no decay, no θ0 kept.
        lr: learning rate, in [0, ∞); a tensor of one number where a captured or compiled step is to see it change.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to √v̂, in [0, ∞).
        delta_decay: strength of the pull toward θ0, in [0, ∞).
        norm: penalty on θ − θ0, "l2" or "l1".
        amsgrad: use the running maximum of v, in v̄ as well.
        foreach: work on lists of tensors at once (None: where all parameters are plain tensors) or one by one.
        maximize: ascend instead of descend.
        pretrained_dtype: "bfloat16" keeps θ0 in bfloat16 where p is wider, None in p's dtype. The pull is then toward
            the rounded θ0: the same steps bit for bit where bfloat16 holds the base exactly, as that of most published
            LLMs; else toward a point off by at most 1/256 of each value, also where no gradient ever came, so that
            deltas hold fewer zeros. After loading a state dict it is "bfloat16" if either side says so, unlike other
            settings, which are the saved ones: a rounded θ0 is never made wide again, as it would look exact.
        capturable: a step never waits for the device, if all groups say so, so that a CUDA graph can hold it; give
            ``lr`` in a tensor on the device. Counts of steps are kept on the parameters' device then.
        compiled: update large parameters by a kernel that ``torch.compile`` makes at the first step, in seconds, and
            that reads them once in place of twice. Needs a C++ compiler on a CPU, Triton on a GPU. The whole step
            compiles too, ``torch.compile(optimizer.step)`` with ``lr`` in a tensor; many parameters take it minutes.

    Raises:
        ValueError: a setting outside its range, a parameter that is complex, on the meta device or a flat one of FSDP1,
            or (when loading) a state dict without θ0.
        RuntimeError: in ``step``, a sparse or complex gradient; nothing has been changed then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta_decay: float = 1e-2,
        norm: Literal["l2", "l1"] = "l2",
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        pretrained_dtype: Literal["bfloat16"] | None = None,
        capturable: bool = False,
        compiled: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "delta_decay": delta_decay,
            "norm": norm,
            "new": False,
        }
        defaults |= {"amsgrad": amsgrad, "foreach": foreach, "maximize": maximize, "pretrained_dtype": pretrained_dtype}
        defaults |= {"capturable": capturable, "compiled": compiled}
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
        """The state of p: entries that are missing are made, and all are moved where p has changed device or dtype."""
        state: State = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if not group["new"] and "pretrained" not in state:
            state["pretrained"] = p.detach().to(theta0_dtype(p, group), copy=True)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = state["exp_avg_sq"].clone(memory_format=torch.preserve_format)
        if not group["amsgrad"] and "exp_avg_sq_sum" not in state and not is_fsdp1_shard(p):
            state["exp_avg_sq_sum"] = full_sum(state["exp_avg_sq"], sum_dtype(p))
        if (state["exp_avg"].device, state["exp_avg"].dtype) != (p.device, p.dtype):
            dtypes = {"exp_avg_sq_sum": sum_dtype(p), "pretrained": theta0_dtype(p, group)}
            for name in state.keys() - {"step"}:
                state[name] = state[name].to(p.device, dtypes.get(name, p.dtype))
        if group.get("capturable") and state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments, step counts and θ0; a θ0 in ``state_dict`` replaces the one taken at construction.

        Raises:
            ValueError: a parameter that the decay applies to has state but no θ0 there, as when Adam saved it.
        """
        saved: dict[Any, State] = state_dict["state"]
        for group in state_dict["param_groups"]:
            for i in group["params"]:
                if saved.get(i) and not group.get("new", False) and "pretrained" not in saved[i]:
                    raise ValueError(
                        f"the state dict has no 'pretrained' values for parameter {i}, got {sorted(saved[i])}: "
                        "expected one saved by AdamR; to start from such weights, make a new AdamR on them"
                    )
        dtypes = [group.get("pretrained_dtype") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, dtype in zip(self.param_groups, dtypes, strict=True):
            group["pretrained_dtype"] = group.get("pretrained_dtype") or dtype
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(ids, parameters, strict=True):
            if "exp_avg_sq_sum" in saved.get(i, {}):  # torch casts state to the parameter's dtype, but for "step"
                self.state[p]["exp_avg_sq_sum"] = saved[i]["exp_avg_sq_sum"].to(p.device, sum_dtype(p))
            if "pretrained" in saved.get(i, {}):
                self.state[p]["pretrained"] = self.state[p]["pretrained"].to(theta0_dtype(p, group))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: computes the loss anew, with gradients.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            RuntimeError: a gradient is sparse or complex; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = self._batches()
        on_device = torch.compiler.is_compiling() or any(batch.on_device for batch in batches)
        root = self._root_mean(batches, on_device=on_device)
        for batch in batches:
            group, present = batch.group, batch.present()
            rate = group["lr"] if on_device else float(group["lr"])
            decays = not group["new"] and group["delta_decay"] != 0
            if present.params:
                update(present, rate * group["delta_decay"] / root if decays else 0.0)
        return loss

    def _root_mean(self, batches: list[Batch], *, on_device: bool) -> Any:
        """√v̄ over the whole parameters, the same number on all ranks: a float, or on the device a scalar tensor."""
        pairs = list(zip(second_moments(batches), batches, strict=True))
        reduced = [(total, sum(batch.numel)) for total, batch in pairs if batch.layout != FSDP1_LAYOUT]
        fsdp1 = [(total, sum(batch.numel)) for total, batch in pairs if batch.layout == FSDP1_LAYOUT]
        shard = next((p for group in self.param_groups for p in group["params"] if is_fsdp1_shard(p)), None)
        # This rank may hold no shard of any parameter with a gradient, but the other ranks wait for it.
        fsdp1_totals = None if shard is None else sum_over_ranks(fsdp1, shard)
        if not on_device and any(batch.params[0].is_cuda for batch in batches):
            check_no_capture()
        take = root_mean_on_device if on_device else root_mean
        return take([total for total, _ in reduced], [count for _, count in reduced], fsdp1_totals)

    def _batches(self) -> list[Batch]:
        """All parameters with a gradient; every gradient is checked before any state is changed."""
        groups = list(enumerate(self.param_groups))
        with_gradient = [(i, group, p) for i, group in groups for p in group["params"] if p.grad is not None]
        for _, _, p in with_gradient:
            check_gradient(p)
        on_device = all(group.get("capturable") for group in self.param_groups)
        batches: dict[Any, Batch] = {}
        for index, group, p in with_gradient:
            state = {name: local_tensor(entry) for name, entry in self._complete_state(p, group).items()}
            param, grad, layout = local_tensor(p), local_tensor(p.grad), shard_layout(p)
            plain = type(param) in (Tensor, torch.nn.Parameter) and type(grad) is Tensor
            key = (index, param.device, param.dtype, plain, layout)
            foreach = plain if group["foreach"] is None else group["foreach"]
            compiled = bool(group.get("compiled"))
            batch = batches.setdefault(key, Batch(group, [], [], [], foreach, layout, [], on_device, compiled))
            batch.params.append(param)
            batch.grads.append(grad)
            batch.states.append(state)
            batch.numel.append(p.numel())
        return list(batches.values())


def check_no_capture() -> None:
    """Check that a step may wait for a CUDA device.

    Raises:
        RuntimeError: the step is being captured into a CUDA graph.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot hold a step that waits for the device: make AdamR(capturable=True)")


def check_settings(group: dict[str, Any]) -> None:
    """Check the settings of a parameter group.

    Raises:
        ValueError: a setting is outside its range.
    """
    infinity, betas = float("inf"), group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    limits = [(name, group[name], infinity) for name in ("lr", "eps", "delta_decay")]
    if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1:
        limits[0] = ("lr", group["lr"].item(), infinity)
    for name, value, end in [*limits, ("betas[0]", betas[0], 1.0), ("betas[1]", betas[1], 1.0)]:
        if not (isinstance(value, Real) and 0.0 <= float(value) < end):
            raise ValueError(f"{name} must be a number in [0, {end}), got {value!r}")
    if group.get("capturable") and group.get("compiled"):
        raise ValueError("capturable=True and compiled=True exclude each other: the compiled kernel waits for v̄")
    choices = {"norm": ("l2", "l1"), "foreach": (None, True, False), "pretrained_dtype": (None, "bfloat16")}
    switches = ("amsgrad", "maximize", "new", "capturable", "compiled")
    for name, allowed in {**choices, **dict.fromkeys(switches, (True, False))}.items():
        if group.get(name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {group.get(name)!r}")


def check_parameter(p: Tensor) -> None:
    """Check that θ0 and the moments of a parameter can be kept.

    Raises:
        ValueError: it is complex, on the meta device, or a flat parameter of FSDP1.
    """
    if getattr(p, "_is_flat_param", False):
        raise ValueError(
            "AdamR got a flat parameter of FSDP1, padded pieces of many: set use_orig_params=True or take FSDP2Strategy"
        )
    if p.is_complex() or p.is_meta:
        raise ValueError(
            f"AdamR copies real values when it is made, got a parameter of {p.dtype} and shape {tuple(p.shape)} on "
            f"{p.device}: load the model's weights first; optimise torch.view_as_real(p) where p is complex"
        )


def theta0_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype that θ0 of p is kept in: bfloat16 where the group asks for it and p's dtype is wider, else p's."""
    narrow = group.get("pretrained_dtype") == "bfloat16" and p.dtype.itemsize > torch.bfloat16.itemsize
    return torch.bfloat16 if narrow else p.dtype


def check_gradient(p: Tensor) -> None:
    """Check that Adam's update is defined for the gradient of p.

    Raises:
        RuntimeError: the gradient is sparse or complex.
    """
    grad = p.grad
    if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
        raise RuntimeError(
            f"AdamR takes dense real gradients, got one of {grad.dtype} and {grad.layout} for a parameter of shape "
            f"{tuple(p.shape)}: build embeddings with sparse=False, or leave it to torch.optim.SparseAdam"
        )
