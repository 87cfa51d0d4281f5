"""Fingerprints: xxh3-128 over tensors, the same on every device."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 over name, dtype, shape and bytes of every tensor, in the order of the names.

    Args:
        tensors: name to tensor of any dtype and device; moved to the CPU one at a time.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]
