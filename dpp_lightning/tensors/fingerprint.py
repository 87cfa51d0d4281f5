"""Fingerprints of tensors: xxh3-128 over names, shapes, dtypes and bytes, the same on every device."""

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

from dpp_lightning.tensors.shards import full_tensor


def hash_tensor(name: str, tensor: Tensor) -> str:
    """xxh3-128 over the name, dtype, shape and bytes of one tensor of any dtype and device: 32 hexadecimal digits.

    Of a tensor in shards the bytes of the whole; a collective.
    """
    digest = xxhash.xxh3_128()
    digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def combine_hashes(digests: Mapping[str, str]) -> str:
    """One fingerprint from those of the tensors, by name; their order does not matter."""
    return xxhash.xxh3_128_hexdigest("".join(digests[name] for name in sorted(digests)).encode())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of several tensors, moved to the CPU one at a time: 32 hexadecimal digits."""
    return combine_hashes({name: hash_tensor(name, tensor) for name, tensor in tensors.items()})


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order, without a copy where it is contiguous and on the CPU.

    Of a tensor in shards the bytes of the whole; a collective.
    """
    flat = full_tensor(tensor.detach()).cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]
