"""Names and shapes of a transformers model's own files where they are not those of the model in memory.

transformers renames, splits and joins tensors as it loads and saves (the experts of a mixture are one tensor in memory,
one a matrix and expert in the file). A folder in the files' form is what other versions and other engines read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

FileShapes = dict[str, tuple[int, ...]]  # name in the file to shape


def file_shapes(model: PreTrainedModel, names: Sequence[str]) -> dict[str, FileShapes] | None:
    """Under which names and in which shapes each of a model's tensors stands in its files.

    Args:
        model: on the meta device.
        names: of the tensors that are written, each tied one once.

    Returns:
        Name in memory to names and shapes in the file; None where tensors can only be converted several together.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name in set(names)}
    try:
        one_by_one = {name: _shapes(revert_weight_conversion(model, {name: state[name]})) for name in names}
        together = _shapes(revert_weight_conversion(model, state))
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return None
    gathered = {name: shape for shapes in one_by_one.values() for name, shape in shapes.items()}
    return one_by_one if gathered == together else None


def file_tensors(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor as it stands in the files: renamed, or split into several.

    Args:
        model: as for :func:`file_shapes`.
        name: of the tensor in memory.
        tensor: the whole tensor.

    Returns:
        Name in the file to tensor.
    """
    with torch.no_grad():
        return dict(revert_weight_conversion(model, {name: tensor}))


def _shapes(state: Mapping[str, Tensor]) -> FileShapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
