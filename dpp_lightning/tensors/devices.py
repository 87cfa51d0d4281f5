"""The device that a model runs on."""

from __future__ import annotations

import torch


def usable_device(device: str | None) -> str:
    """The device asked for, or the best one here.

    Args:
        device: cpu, cuda, cuda:1; None for cuda where there is one, else cpu.

    Raises:
        ValueError: it cannot be used here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).cpu()  # which meta has not
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here ({reason}); try --device cpu") from error
    return device
