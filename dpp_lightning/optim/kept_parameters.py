"""Train chosen entries of parameters alone, with optimizer state for these and for no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dpp_lightning.tensors.flat_entries import gather_entries, scatter_entries

# They take a parameter as a matrix, keep parameters of their own, or take sparse gradients.
_ALL = "give the optimizer all that is to be trained, unfrozen, before the training begins"
_NOT_BY_ENTRY = {"LBFGS", "Muon", "SparseAdam", "ZeroRedundancyOptimizer"}


@dataclass(frozen=True)
class _Kept:
    """A parameter of the model, the positions of its trained entries, and the parameter that the optimizer has."""

    parameter: Tensor
    positions: Tensor
    values: Parameter


class KeptParameters:
    """Puts a one-dimensional parameter of the trained entries in the place of each parameter in an optimizer.

    The model keeps its parameters. Before each step their gradients are gathered (:meth:`gather_gradients`); after each
    step, by a hook of the optimizer, the stepped entries are written into them. Every other entry keeps its bits. What
    the optimizer holds of a parameter (moments, AdamR's θ0) has the size of its trained entries.

    Args:
        optimizer: made on the model's parameters; one that treats each entry by itself, such as AdamW, SGD or AdamR.
        positions: model parameter to the sorted distinct flat positions of its trained entries, int64, shape (kept,);
            the optimizer's other parameters are trained whole.

    Attributes:
        num_entries: how many entries the optimizer's parameters among these have.
        num_kept: how many of them are trained.

    Raises:
        ValueError: no entry would be trained, the optimizer does not treat each entry by itself, or two of its
            parameters lie on one memory.
    """

    def __init__(self, optimizer: Optimizer, positions: Mapping[Tensor, Tensor]) -> None:
        check_by_entry(optimizer)
        _check_memory(optimizer)
        self._optimizer = optimizer
        self._kept: list[_Kept] = []
        self._untrained: list[Tensor] = []
        in_optimizer = [p for group in optimizer.param_groups for p in group["params"] if p in positions]
        self.num_entries = sum(p.numel() for p in in_optimizer)
        self.num_kept = sum(len(positions[p]) for p in in_optimizer)
        if not self.num_kept:
            raise ValueError(
                f"{type(optimizer).__name__} would train none of its entries: return an optimizer of this module's "
                "parameters from configure_optimizers, made anew for each fit, or lower the pruning_rate"
            )
        for group in optimizer.param_groups:
            self._replace(optimizer, group, positions)
        self._frozen = [parameter for parameter in self._untrained if not parameter.requires_grad]
        self._in_optimizer = _count(optimizer)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._write())

    def _replace(self, optimizer: Optimizer, group: dict[str, Any], positions: Mapping[Tensor, Tensor]) -> None:
        """Put the trained entries in the place of a group's parameters; those that have none leave the group."""
        trained = []
        for index, parameter in enumerate(group["params"]):
            kept = positions.get(parameter)
            if kept is None or 0 < len(kept) == parameter.numel():
                trained.append((index, parameter))
            elif len(kept):
                trained.append((index, self._values(optimizer, parameter, kept.to(parameter.device))))
            else:
                self._untrained.append(parameter)
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for _, parameter in trained]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][index] for index, _ in trained]

    def _values(self, optimizer: Optimizer, parameter: Tensor, positions: Tensor) -> Parameter:
        """The parameter of the trained entries of one of the model, with what the optimizer holds of these."""
        values = Parameter(gather_entries(parameter, positions), requires_grad=parameter.requires_grad)
        self._kept.append(_Kept(parameter, positions, values))
        state: dict[str, Any] | None = optimizer.state.pop(parameter, None)
        if state is not None:
            optimizer.state[values] = {name: _kept_state(entry, parameter, positions) for name, entry in state.items()}
        return values

    def gather_gradients(self) -> None:
        """Give the optimizer the gradients of the trained entries, and let go of the model's.

        Raises:
            RuntimeError: a gradient is sparse, or parameters were unfrozen or added to the optimizer since it began.
        """
        if _count(self._optimizer) != self._in_optimizer:
            raise RuntimeError(f"parameters were added to the optimizer, of which all entries would be trained: {_ALL}")
        if unfrozen := [tuple(parameter.shape) for parameter in self._frozen if parameter.grad is not None]:
            raise RuntimeError(
                f"parameters of shapes {unfrozen} were unfrozen, of which no entry would be trained: {_ALL}"
            )
        for kept in self._kept:
            gradient = kept.parameter.grad
            if gradient is not None and gradient.is_sparse:
                raise RuntimeError("a share of the entries cannot be trained by sparse gradients: pass sparse=False")
            kept.values.grad = None if gradient is None else gather_entries(gradient, kept.positions)
            kept.parameter.grad = None
        for parameter in self._untrained:
            parameter.grad = None

    def _write(self) -> None:
        """Write the stepped entries into the model."""
        for kept in self._kept:
            scatter_entries(kept.parameter, kept.positions, kept.values.detach())

    def release(self) -> None:
        """End the writing after each step; the optimizer keeps its parameters."""
        self._hook.remove()


def check_by_entry(optimizer: Optimizer) -> None:
    """Refuse an optimizer that does not treat each entry of a parameter by itself.

    Raises:
        ValueError: it is one of those.
    """
    if names := _NOT_BY_ENTRY & {kind.__name__ for kind in type(optimizer).__mro__}:
        raise ValueError(
            f"{min(names)} does not step each entry of a parameter by itself, so that it cannot train a share of them: "
            "take AdamW, AdamR or SGD"
        )


def _kept_state(entry: Any, parameter: Tensor, positions: Tensor) -> Any:
    """What an optimizer holds of a parameter: gathered where it has an entry for each of the parameter's."""
    by_entry = isinstance(entry, Tensor) and entry.shape == parameter.shape
    return gather_entries(entry, positions) if by_entry else entry


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _check_memory(optimizer: Optimizer) -> None:
    """Refuse two parameters on one memory, of which one's untrained entries would be trained by the other.

    Raises:
        ValueError: with their shapes.
    """
    places: dict[int, Tensor] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.numel()):
        other = places.setdefault(parameter.data_ptr(), parameter)
        if other is not parameter:
            raise ValueError(
                f"two parameters, of shapes {tuple(other.shape)} and {tuple(parameter.shape)}, lie on one memory: let "
                "the module hold one parameter in both places (a.weight = b.weight), as is done to tie weights"
            )
