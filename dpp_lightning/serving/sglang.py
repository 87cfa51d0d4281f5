"""A loader for SGLang's ``--custom-weight-loader``: written from its source, and never run against SGLang.

    python -m sglang.launch_server --model-path BASE --custom-weight-loader dpp_lightning.serving.sglang.load_delta

``engine.update_weights_from_tensor([("BASE", EMPTY), ("DELTA", EMPTY)],
load_format="dpp_lightning.serving.sglang.load_delta")`` then gives every worker the names of two folders, of which it
loads the dense model; EMPTY is ``torch.empty(0)``. The pair of the base alone goes back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dpp_lightning.serving.base_checkpoint import BaseCheckpoint


def load_delta(model: Any, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Load base plus delta, or the base, through the model's own loader.

    Args:
        model: SGLang's.
        named_tensors: the base's folder or hub id and the delta's as names of tensors, which are not looked at.

    Raises:
        ValueError: neither one nor two names, or as :meth:`BaseCheckpoint.changes`; nothing is loaded then.
    """
    if len(named_tensors) not in (1, 2):
        raise ValueError(f"expected the names of a base and, unless it is wanted, a delta, got {len(named_tensors)}")
    base, *delta = (name for name, _ in named_tensors)
    checkpoint = BaseCheckpoint(base)
    model.load_weights(checkpoint.dense(checkpoint.changes(delta[0]) if delta else {}))
