"""Activation checkpointing, which computes activations twice to save memory, in models of transformers and timm."""

from typing import Any, cast

from torch import nn


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass and compute the rest again; gradients are the same.

    Args:
        model: a model of transformers or timm, changed in place.

    Raises:
        ValueError: an architecture that cannot do it.
    """
    # transformers renames the method, and will drop the older name
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    try:
        if enable is not None:
            enable({"use_reentrant": False})
        else:
            cast(Any, model).set_grad_checkpointing(True)
    except (AttributeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"gradient_checkpointing is set, but {type(model).__name__} cannot do it; leave it out"
        ) from error
