"""Files mapped into memory: read page by page as they are touched, however large.

safetensors' own ``load_file`` maps a file too, but as a private writable mapping that the kernel charges in full, so
that a file larger than memory is refused ("Cannot allocate memory") before a byte of it is read.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

METADATA = "__metadata__"  # the header's entry that is no tensor
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's mmap since 3.13


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as views of its mapped pages: nothing is read before it is touched.

    The pages are the file's own, so the kernel can drop them at any time and no memory is used up; writing into a
    tensor copies the pages it touches and never alters the file. The file must not be shortened or rewritten in place
    while tensors of it are in use.

    Args:
        path: file of any size, also larger than memory.

    Returns:
        Name to CPU tensor, each with a storage of its own, in the order of the header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or truncated file, or a dtype that torch lacks.
        MemoryError: the system refuses to map the file.
    """
    try:
        with safe_open(path, framework="np"):  # checks header, sizes, holes, overlaps
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again, or save the model again "
            "with save_pretrained(folder)"
        ) from error
    pages = map_pages(path)
    start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:start])
    return {name: _view(path, pages, start, name, header[name]) for name in header if name != METADATA}


def map_pages(path: Path) -> mmap.mmap:
    """A whole file as private pages, copied when written, which count as memory only from then on.

    Raises:
        ValueError: an empty file.
        MemoryError: the system refuses.
    """
    try:
        with path.open("rb") as file:
            if sys.platform == "linux":
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(
            f"{path}: the system refuses to map {path.stat().st_size} bytes; under vm.overcommit_memory=2 set it to 0 "
            "or 1, or save the model in smaller shards with save_pretrained(folder, max_shard_size='2GB')"
        ) from error


def will_need(tensor: Tensor) -> None:
    """Have the kernel start reading a mapped tensor's pages; it returns at once, and other tensors are left alone."""
    size = tensor.numel() * tensor.element_size()
    if sys.platform == "linux" and size and tensor.device.type == "cpu" and tensor.is_contiguous():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + size - start), mmap.MADV_WILLNEED
        )


def _view(path: Path, pages: mmap.mmap, start: int, name: str, about: dict) -> Tensor:
    """One tensor of a checked header; ``start`` is where the data begins in the file."""
    if about["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {about['dtype']}; expected one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start + about["data_offsets"][0]).reshape(shape)
