"""Optimizers: AdamR."""

from dpp_lightning.optim.adamr import AdamR

__all__ = ["AdamR"]
