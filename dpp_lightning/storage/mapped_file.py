"""Files of weights mapped into memory: read page by page as they are touched, however large.

safetensors' own ``load_file`` and ``torch.load(mmap=True)`` map a file too, but as a private writable mapping that the
kernel charges in full, so that a file larger than memory is refused ("Cannot allocate memory") before a byte of it is
read. A mapped file stays open as long as a tensor of it is in use: Windows does not replace or delete it until then.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensorMode

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
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Linux; in Python's mmap since 3.13
_CURE = "save the weights again with save_pretrained(folder), which writes safetensors"


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as views of its mapped pages: nothing is read before it is touched.

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
    data_start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:data_start])
    return {name: _view(path, pages, data_start, name, header[name]) for name in header if name != METADATA}


def map_torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of ``torch.save`` as views of its mapped pages, by the unpickler that runs no code.

    Args:
        path: a state dict, or a dict with one under ``state_dict`` (a checkpoint of Lightning).

    Returns:
        Name to CPU tensor; tied ones share their storage, entries that are no tensors are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one with more than weights in it, no state dict, or the format before torch 1.6.
        MemoryError: the system refuses to map the file.
    """
    try:
        content = _load_mapped(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights: {refused_global(error) or error} is not allowed, since unpickling it "
            f"could run any code; {_CURE}, or save model.state_dict() alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file ends in almost any type
        old = "mmap can only be used" in str(error)
        what = "is not in PyTorch's zip format (of version 1.6 and later)" if old else f"cannot be read ({error})"
        raise ValueError(f"{path} {what}; {_CURE}, or fetch the file again") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or any(isinstance(value, Mapping | list | tuple) for value in state.values()):
        keys = ", ".join([repr(key) for key in content][:10]) if isinstance(content, Mapping) else ""
        got = f"a dict of {keys}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a state dict, or a checkpoint with a 'state_dict', got {got}; {_CURE}")
    return {str(name): tensor.detach() for name, tensor in state.items() if isinstance(tensor, Tensor)}


def refused_global(error: pickle.UnpicklingError) -> str | None:
    """The class or function that a file of ``torch.save`` names and the unpickler refused; None for another fault."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    return refused[1] if refused else None


def load_outline(file: Path | BinaryIO) -> object:
    """What a file of ``torch.save`` holds, with tensors that only know where in it they lie: no weights are read.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and plain values.
        RuntimeError: it is damaged.
    """
    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


def fill_outline(state: Mapping[str, object], pages: mmap.mmap, start: int = 0) -> dict[str, object]:
    """A state dict of :func:`load_outline` with its tensors as views of the mapped file; tied ones stay tied.

    Args:
        state: name to tensor without data (or to anything else, which is kept).
        pages: the mapped file.
        start: where in it the zip begins.

    Raises:
        ValueError: this torch does not say where in the file a tensor lies, or one lies outside the file.
    """
    storages: dict[int, UntypedStorage] = {}

    def fill(fake: Tensor) -> Tensor:
        fake_storage = fake.untyped_storage()
        if not fake_storage.nbytes():
            return torch.empty(fake.shape, dtype=fake.dtype)
        if fake_storage._cdata not in storages:
            offset = fake_storage._checkpoint_offset
            if offset is None:
                raise ValueError(f"torch {torch.__version__} does not say where in the file its tensors lie")
            data = torch.frombuffer(pages, dtype=torch.uint8, count=fake_storage.nbytes(), offset=start + offset)
            storages[fake_storage._cdata] = data.untyped_storage()
        empty = torch.empty(0, dtype=fake.dtype)
        return empty.set_(storages[fake_storage._cdata], fake.storage_offset(), fake.shape, fake.stride())  # type: ignore[call-overload]

    return {name: fill(value) if isinstance(value, Tensor) else value for name, value in state.items()}


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
    """Have Linux start reading a mapped tensor's pages; it returns at once, and other tensors are left alone."""
    size = tensor.numel() * tensor.element_size()
    if sys.platform == "linux" and size and tensor.device.type == "cpu" and tensor.is_contiguous():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + size - start), mmap.MADV_WILLNEED
        )


def _view(path: Path, pages: mmap.mmap, data_start: int, name: str, entry: dict) -> Tensor:
    """One tensor by its entry in a checked header; its offsets count from where the data begins in the file."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=data_start + entry["data_offsets"][0]).reshape(
        shape
    )


def _load_mapped(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "Cannot allocate memory" not in str(error):
            raise
    # the kernel refuses torch's kind of mapping for a file larger than memory: read where the tensors lie, and map it
    content = load_outline(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    return fill_outline(state, map_pages(path)) if isinstance(state, Mapping) else content
