"""What is pruned, looked at before training: that the methods can hold it, and that its base will be there again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dpp_lightning.callbacks.prune_run.settings import PruneSettings
from dpp_lightning.methods.block_checks import check_method
from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.registry import METHODS
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.pruning.coverage import check_rates
from dpp_lightning.pruning.known_inputs import unknown_inputs
from dpp_lightning.pruning.scope import Scope
from dpp_lightning.storage.locate import few_names
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import named_tensors

LayerInputs = Mapping[str, InputStatistics]


def tensors_to_prune(scope: Scope, base: Mapping[str, Tensor], module: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
    """The tensors in scope that training will change, by canonical name.

    Args:
        scope: with what is carried.
        base: theta_0.
        module: is trained.
        frozen: those count too that take no gradients now, as they may be trained later; they do anyway where none
            takes any.

    Raises:
        ValueError: nothing is in scope.
    """
    tensors = {n.name: n.tensor for n in named_tensors(module)}
    pruned = {name: tensors[name] for name, fate in scope.fates(base, tensors).items() if fate == "prune"}
    trained = {name: tensor for name, tensor in pruned.items() if tensor.requires_grad and not frozen}
    return trained or pruned


def check_methods(settings: PruneSettings, scope: Scope, pruned: Mapping[str, Tensor]) -> None:
    """Refuse a method by blocks if nothing that is pruned is in one, and a rate that leaves a method nothing to hold.

    Raises:
        ValueError: with the method.
    """
    for method in settings.methods:
        if METHODS[method].by_blocks:
            check_method(f"{method} goes", scope.placed(pruned))
    check_rates(settings.specs, {name: tuple(tensor.shape) for name, tensor in pruned.items()})


def check_inputs(
    settings: PruneSettings,
    scope: Scope,
    pruned: Mapping[str, Tensor],
    of_some: LayerInputs,
    of_all: Callable[[], LayerInputs],
) -> None:
    """Refuse a method that goes by the inputs of linear maps where most of these are not known.

    Args:
        settings: of the callback.
        scope: tells the linear maps.
        pruned: canonical name to tensor.
        of_some: inputs on some of the calibration data, which may not reach every expert.
        of_all: gives those on all of it.

    Raises:
        ValueError: with the method and the names.
    """
    if not settings.needs_inputs:
        return

    def check(inputs: LayerInputs) -> None:
        known = match_names(pruned, inputs)
        pairs = [
            TensorPair.of(
                name,
                tensor,
                tensor,
                inputs[known[name]] if name in known else None,
                block=scope.block_of(name),
                linear=scope.is_linear_map(name, tensor.shape),
            )
            for name, tensor in pruned.items()
        ]
        for method in settings.methods:
            unknown_inputs(pairs, method, settings.method_settings.get(method, {}))

    try:
        check(of_some)
    except ValueError:
        check(of_all())


def warn_of_own_base(pruned: Mapping[str, Tensor], module: nn.Module) -> None:
    """Warn of tensors whose theta_0 is in no file: those that a module has beside its transformers model.

    Args:
        pruned: canonical names of what is pruned.
        module: the base is what it holds now.
    """
    named = named_tensors(module)
    if not any(n.in_model for n in named):
        return
    own = sorted(n.name for n in named if not n.in_model and n.name in pruned)
    if own:
        parts = sorted({f"{name.partition('.')[0]}.*" if "." in name else name for name in own})
        rank_zero_warn(
            f"{few_names(own)} are no part of the pre-trained model, so that a delta of them fits only the values that "
            f"they have now: carry={parts} stores them whole, and the deltas then fit the model's own files"
        )
