"""Whether the inputs of a model's linear maps are known, where a method goes by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpp_lightning.methods.input_statistics import InputStatistics
from dpp_lightning.methods.registry import get_method
from dpp_lightning.methods.tensor_pair import TensorPair
from dpp_lightning.tensors.blocks import is_table

_MOST = 0.5  # of the entries
_SHOWN = 4  # names in a message


def unknown_inputs(pairs: Sequence[TensorPair], method: str, settings: Mapping[str, Any]) -> str | None:
    """Refuse a method where the inputs of most of what it weighs by them are not known.

    Looked at are the linear maps, of which those inside the model's blocks decide whether they are most; of a model
    without any there, all tensors of two or more dimensions that are no tables of embeddings.

    Args:
        pairs: what is pruned, with the inputs where they are known.
        method: its name.
        settings: the method's own settings.

    Returns:
        One line of warning with the names where few are unknown; None where all are known, or the method does not go by
        inputs.

    Raises:
        ValueError: those with more than half of the entries are unknown; one line with the names and the cures.
    """
    row = get_method(method)
    if not row.needs_inputs(settings):
        return None
    fitted = row.fit is not None and row.fit.needs_inputs
    inside = [pair for pair in pairs if pair.linear]
    looked_at = [*inside, *filter(_map_outside, pairs)] if inside else [pair for pair in pairs if _matrix(pair)]
    unknown = [pair for pair in looked_at if not _known(pair.inputs, fitted=fitted)]
    if not unknown:
        return None
    names = ", ".join(pair.name for pair in unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
    what = "linear maps" if inside else "weights"
    count = f"{len(unknown)} of {len(looked_at)} {what} ({100 * _share(unknown, looked_at):.3g} % of their entries)"
    reason, cure = _reason(unknown)
    if _share(unknown, inside or looked_at) > _MOST:
        raise ValueError(
            f"{method} goes by the inputs of linear maps, and {count} {reason}: {names}. {cure} "
            f"{_without_inputs(row.inputs, fitted=fitted)}"
        )
    treated = "have the mean q of the others" if fitted else "are ranked by their delta alone"
    return f"{method} goes by the inputs of linear maps, and {count} {reason}, so they {treated}: {names}"


def _share(some: Sequence[TensorPair], pairs: Sequence[TensorPair]) -> float:
    """Of the entries of pairs, the share that lies in some of them."""
    names = {pair.name for pair in some}
    return sum(pair.numel for pair in pairs if pair.name in names) / max(sum(pair.numel for pair in pairs), 1)


def _reason(unknown: Sequence[TensorPair]) -> tuple[str, str]:
    """Why nothing is known of the inputs of some weights, and how a cure begins."""
    if all(pair.inputs is not None for pair in unknown):
        return "hold several experts in one tensor", "Take"
    if all(len(pair.shape) > 2 and not pair.linear for pair in unknown):
        return "are convolutions or the like", "Take"
    return (
        "have inputs that are not known on the calibration data",
        "Give data that reaches them, such as a .safetensors batch with all inputs of the model by name (pixel_values "
        "beside input_ids), or take",
    )


def _map_outside(pair: TensorPair) -> bool:
    """Whether a tensor is a linear map outside the blocks, such as a projector, by all that its name tells."""
    weight = len(pair.shape) == 2 and pair.block is None and pair.name.endswith(".weight")
    return weight and not is_table(pair.name) and not (pair.inputs is not None and pair.inputs.embedding)


def _matrix(pair: TensorPair) -> bool:
    return len(pair.shape) > 1 and not (pair.inputs is not None and pair.inputs.embedding)


def _known(inputs: InputStatistics | None, *, fitted: bool) -> bool:
    return inputs is not None and (inputs.of_one_map or not (fitted or inputs.embedding))


def _without_inputs(selects_by_inputs: bool, *, fitted: bool) -> str:
    if fitted:
        return "method 'darex-q', which finds one q for the whole model"
    return "method 'magnitude'" if selects_by_inputs else "score=magnitude"
