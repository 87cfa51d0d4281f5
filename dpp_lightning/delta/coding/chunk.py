"""Chunks of kept entries to bytes and back: the blob ``kept`` of a delta file is one chunk after the other.

All pruned tensors in the order of the config's table, each in C order, form one line of entries. A chunk covers the
next ``span`` of them: a head, the streams of its positions (:mod:`dpp_lightning.delta.coding.positions`), those of its
values (:mod:`dpp_lightning.delta.coding.values`). So 200 tensors cost no 200 headers, and a file is written and read in
bounded memory. Every stream is one zstandard frame, or the bytes as they are where that is no larger.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from dpp_lightning.delta.coding.positions import (
    CODINGS,
    SEED,
    ByteArray,
    Int64Array,
    decode_positions,
    encode_positions,
    largest_streams,
)
from dpp_lightning.delta.coding.values import PLANES, SIGNS, decode_values, encode_values, stream_count
from dpp_lightning.tensors.dtypes import DTYPES

CHUNK_KEPT = 1 << 20  # kept entries that are encoded together at most; a larger tensor is cut
CHUNK_LEAST = 1 << 15  # smaller tensors share a chunk until it has that many: gaps are coded for one density a chunk
SEEDED_LEAST = 1 << 18  # the same where no gaps are stored
_LIMIT = CHUNK_KEPT + SEEDED_LEAST
_HEAD = struct.Struct("<QIBBBB")  # span, kept, coding and low bits of the positions, dtype and form of the values
_STREAM = struct.Struct("<II")  # bytes in the file, bytes of the stream: equal where it is stored as it is
_LEVEL = 1  # zstandard: with these streams the higher levels are slower and no smaller


@dataclass(frozen=True)
class Head:
    """What a chunk says of itself, checked against the largest it could be.

    Attributes:
        span: entries covered.
        kept: entries kept of them.
        coding, shift: of the positions, see :mod:`dpp_lightning.delta.coding.positions`.
        dtype, form: of the values, see :mod:`dpp_lightning.delta.coding.values`.
        streams: (first byte, bytes in the file, bytes of the stream) of each, those of the positions first.
        value_streams: how many of them, the last ones, are the values'.
        stop: where the next chunk begins in the blob.
    """

    span: int
    kept: int
    coding: int
    shift: int
    dtype: str
    form: int
    streams: list[tuple[int, int, int]]
    value_streams: int
    stop: int

    def stored(self, *, values: bool) -> int:
        """Bytes in the file of the streams of values, or of positions, their own heads included."""
        cut = len(self.streams) - self.value_streams
        return sum(_STREAM.size + stored for _, stored, _ in (self.streams[cut:] if values else self.streams[:cut]))


@dataclass(frozen=True)
class Chunk:
    """One decoded chunk.

    Attributes:
        head: what it said of itself.
        positions: kept positions in each tensor that the chunk touches, counted within the tensor, sorted.
        values: the values of all of them, float32, bfloat16 or float16, shape (kept,).
    """

    head: Head
    positions: list[Int64Array]
    values: Tensor


def encode_chunk(
    span: int, positions: Int64Array, values: list[Tensor], dtype: str, *, seeded: bool, compressed: bool = True
) -> bytes:
    """One chunk.

    Args:
        span: entries that it covers.
        positions: kept positions in [0, span), sorted.
        values: kept values of each tensor that has any here, in order.
        dtype: one of ``DTYPES``; the values are exact in it.
        seeded: the positions follow from the seed and are not stored.
        compressed: streams are compressed where that makes them smaller.
    """
    coding, shift, streams = (SEED, 0, []) if seeded else encode_positions(positions, span)
    form, planes = encode_values(values, dtype) if len(positions) else (0, [])
    head = _HEAD.pack(span, len(positions), coding, shift, DTYPES.index(dtype), form)
    compressor = zstandard.ZstdCompressor(level=_LEVEL) if compressed else None
    return b"".join([head, *(_stored_stream(stream, compressor) for stream in (*streams, *planes))])


def read_head(blob: ByteArray, start: int, left: int, *, seeded: bool) -> Head:
    """The head of the chunk at ``start``; nothing is decoded and no memory taken yet.

    Args:
        blob: all chunks, shape (bytes,).
        start: where this one begins.
        left: entries that this chunk and those after it have to cover.
        seeded: the positions follow from the seed.

    Raises:
        ValueError: anything that :func:`encode_chunk` does not write.
    """
    if start + _HEAD.size > len(blob):
        raise ValueError(f"the chunks end {left} entries before the tensors do")
    span, kept, coding, shift, kind, form = _HEAD.unpack_from(blob.data, start)
    if not 0 < span <= left or kept > min(span, _LIMIT):
        raise ValueError(f"a chunk of {kept} kept in {span} entries, where {left} entries are left")
    if coding not in CODINGS or (coding == SEED) != seeded:
        raise ValueError(f"coding {coding} of positions, which {'follow' if seeded else 'do not follow'} from a seed")
    if kind >= len(DTYPES) or form not in (PLANES, SIGNS):
        raise ValueError(f"dtype {kind} and form {form} of values are not known")
    dtype = DTYPES[kind]
    planes = stream_count(dtype, form) if kept else 0
    limits = [*largest_streams(coding, shift, kept, span), *[kept + 1] * planes]
    position, streams = start + _HEAD.size, []
    for limit in limits:
        if position + _STREAM.size > len(blob):
            raise ValueError("the last chunk is cut short")
        stored, size = _STREAM.unpack_from(blob.data, position)
        if size > limit or stored > size or position + _STREAM.size + stored > len(blob):
            raise ValueError(f"a stream of {stored} bytes for {size}, where {limit} are the most")
        streams.append((position + _STREAM.size, stored, size))
        position += _STREAM.size + stored
    return Head(span, kept, coding, shift, dtype, form, streams, planes, position)


def decode_chunk(blob: ByteArray, head: Head, locate: Callable[[Int64Array | None], list[Int64Array]]) -> Chunk:
    """The chunk of a head.

    Args:
        blob: all chunks, shape (bytes,).
        head: from :func:`read_head`.
        locate: from the stored positions in [0, span), or None where the seed gives them, to those in each tensor that
            the chunk touches.

    Raises:
        ValueError: streams that :func:`encode_chunk` does not write, or a seed that keeps another number of entries.
    """
    streams = [_expanded_stream(blob, *stream) for stream in head.streams]
    cut, stored = len(streams) - head.value_streams, None
    if head.coding != SEED:
        stored = decode_positions(head.coding, head.shift, streams[:cut], head.kept, head.span)
    positions = locate(stored)
    counts = [len(tensor_positions) for tensor_positions in positions]
    if sum(counts) != head.kept:
        raise ValueError(f"the seed keeps {sum(counts)} of these {head.span} entries, the file states {head.kept}")
    values = torch.empty(0)
    if head.kept:
        values = decode_values(head.dtype, head.form, streams[cut:], [c for c in counts if c])
    return Chunk(head, positions, values)


def _expanded_stream(blob: ByteArray, begin: int, stored: int, size: int) -> ByteArray:
    data: ByteArray = blob[begin : begin + stored]
    if stored == size:
        return data
    try:
        if zstandard.frame_content_size(data.data) != size:
            raise ValueError(f"a compressed stream that does not state its {size} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data.data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a stream that cannot be decompressed: {error}") from error
    return np.frombuffer(raw, dtype=np.uint8)


def _stored_stream(stream: npt.NDArray[np.uint8], compressor: zstandard.ZstdCompressor | None) -> bytes:
    """A stream with its head: compressed, or as it is where that is no larger or there is no compressor."""
    data = compressor.compress(stream.data) if compressor and len(stream) > 32 else b""
    if not data or len(data) >= len(stream):
        data = stream.tobytes()
    return _STREAM.pack(len(data), len(stream)) + data
