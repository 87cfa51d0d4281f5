"""One line on the model that is trained, in place of Lightning's table of its parts."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info


class ModelSize(pl.Callback):
    """Says how many parameters are trained when a fit begins."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it, on rank 0."""
        rank_zero_info(size_line(pl_module))


def size_line(module: pl.LightningModule) -> str:
    """Number of parameters, how many of them are trained, and their bytes."""
    parameters = list(module.parameters())
    entries = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in parameters)
    part = "all trained" if trained == entries else f"{trained:,} of them trained"
    return f"{type(module).__name__}: {entries:,} parameters, {part}, {size / 1e6:,.1f} MB"
