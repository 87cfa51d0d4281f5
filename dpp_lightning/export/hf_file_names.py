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

Form = dict[str, tuple[int, ...]]  # name in the file to shape


def saved_forms(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Form] | None:
    """What each of a model's tensors is in its files.

    Args:
        model: on the meta device.
        names: of the tensors that are written, each tied one once.

    Returns:
        Own name to names and shapes in the file; None where tensors can only be converted several together.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name in set(names)}
    try:
        forms = {name: _shapes(revert_weight_conversion(model, {name: state[name]})) for name in names}
        together = _shapes(revert_weight_conversion(model, state))
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return None
    apart = {name: shape for form in forms.values() for name, shape in form.items()}
    return forms if apart == together else None


def saved_parts(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor as it is in the files.

    Args:
        model: as for :func:`saved_forms`.
        name: own name.
        tensor: whole.
    """
    with torch.no_grad():
        return dict(revert_weight_conversion(model, {name: tensor}))


def _shapes(state: Mapping[str, Tensor]) -> Form:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
