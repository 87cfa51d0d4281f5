"""A model larger than its device: its blocks stay in the host's memory, and each is on the device while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stream_blocks(module: nn.Module, blocks: Sequence[nn.Module], device: torch.device | str) -> None:
    """Put a model on a device, but for its blocks, which go there one after the other as they run.

    What a block computes stays on the device, its weights do not: a pass backward through a block has to end before the
    block's forward hooks do, as with :meth:`dpp_lightning.calibration.teacher.Teacher.backward_by_block`. Weights are
    read from the host's memory again for every pass, and what is written to them between passes is what runs.

    Args:
        module: in the host's memory; for good, as the hooks are not taken off again.
        blocks: modules inside it, none inside another.
        device: where it runs.
    """
    inside = {id(tensor) for block in blocks for tensor in _tensors_of(block)}
    for tensor in _tensors_of(module):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        place = _Place(block, device)
        block.register_forward_pre_hook(place.bring)
        block.register_forward_hook(place.take_away, always_call=True)


class _Place:
    """Where the weights of one block are."""

    def __init__(self, block: nn.Module, device: torch.device | str) -> None:
        self.tensors, self.device = _tensors_of(block), device
        self.kept: list[Tensor] = []

    def bring(self, _module: nn.Module, _inputs: Any) -> None:
        if self.kept:  # an earlier pass broke off before its hooks
            self.take_away()
        self.kept = [tensor.data for tensor in self.tensors]
        for tensor in self.tensors:
            tensor.data = tensor.data.to(self.device)

    def take_away(self, *_: Any) -> None:
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            tensor.data = kept
        self.kept = []


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, those that are shared once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())
