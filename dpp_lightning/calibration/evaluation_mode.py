"""Passes through a model in evaluation mode that leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dpp_lightning.tensors.interrupts import restored_after
from dpp_lightning.tensors.shards import is_dtensor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards modes and buffers of every part of the module are as they were.

    torch's fast path of attention is off, whose nested tensors are only of passes without gradients.
    """
    before, fast = {part: part.training for part in module.modules()}, torch.backends.mha.get_fastpath_enabled()
    put_buffers_back = buffers_kept(module)

    def restore() -> None:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in before.items():
            part.training = training
        put_buffers_back()

    with restored_after(restore):
        torch.backends.mha.set_fastpath_enabled(False)
        module.eval()
        yield


def buffers_kept(module: nn.Module) -> Callable[[], None]:
    """A function that gives a module's buffers the values that they have now; those in shards are left out."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_dtensor(buffer)]

    @torch.no_grad()
    def put_back() -> None:
        for buffer, before in buffers:
            if buffer.shape == before.shape and not torch.equal(buffer, before):
                buffer.copy_(before)

    return put_back
