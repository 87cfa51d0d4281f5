"""How much memory and time a file may ask for: a bounded multiple of its own bytes, so that a small one costs little.

Numbers that are all equal compress without bound, so what a chunk may take is checked before it is decoded, and a
writer stores the streams of such chunks as they are where the bound would be passed.
"""

from __future__ import annotations

from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS

FREE_BYTES = 1 << 24  # of memory, whatever the file's size
BYTES_FOR_ONE = 256  # of memory for every byte in the file
_INDEX_BYTES = 8
_FREE_BLOCKS = 1 << 14  # of the sampler, 2**36 entries; drawing nothing from so many takes about a second
_BYTES_OF_BLOCK = 4  # in the file, at least, for every further block
_FREE_TENSORS = 1 << 12
_BYTES_OF_TENSOR = 8  # in the file, at least, for every further tensor: in memory each takes some kB


def memory_of(kept: int, dtype: str) -> int:
    """Bytes that kept entries take in memory at most: their positions, and their values, integers as float32."""
    return kept * (_INDEX_BYTES + (4 if dtype in INTEGERS else FLOATS[dtype].itemsize))


def most_memory(stored: int) -> int:
    """The most bytes of memory that the entries in ``stored`` bytes of chunks may take together."""
    return FREE_BYTES + BYTES_FOR_ONE * stored


def most_tensors(stored: int) -> int:
    """The most pruned tensors that a file with ``stored`` bytes of tensors may have."""
    return _FREE_TENSORS + stored // _BYTES_OF_TENSOR


def least_bytes(tensors: int) -> int:
    """The fewest bytes of tensors that a file with so many pruned tensors may have."""
    return max(0, tensors - _FREE_TENSORS) * _BYTES_OF_TENSOR


def most_blocks(stored: int) -> int:
    """The most blocks of the sampler that positions may be drawn from for ``stored`` bytes of chunks."""
    return _FREE_BLOCKS + stored // _BYTES_OF_BLOCK
