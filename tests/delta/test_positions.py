"""Positions to bytes and back: an inverse for every set, close to the entropy, and nothing but sorted sets come out."""

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpp_lightning.analysis.delta_cost import position_entropy
from dpp_lightning.delta.coding.chunk import decode_chunk, encode_chunk, read_head
from dpp_lightning.delta.coding.positions import (
    ALL,
    BITMAP,
    GAPS,
    SEED,
    decode_positions,
    encode_positions,
    largest_streams,
)


def back(positions, span):
    """Encoded, held against the limits that a reader sets, decoded."""
    coding, shift, streams = encode_positions(positions, span)
    limits = largest_streams(coding, shift, len(positions), span)
    assert [len(s) <= most for s, most in zip(streams, limits, strict=True)] == [True] * len(streams)
    return decode_positions(coding, shift, streams, len(positions), span)


def check_inverse(positions, span):
    read = back(np.asarray(positions, dtype=np.int64), span)
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, positions)


def is_sorted_set(positions, kept, span):
    inside = not len(positions) or (positions[0] >= 0 and positions[-1] < span)
    return len(positions) == kept and inside and bool((np.diff(positions) > 0).all())


@st.composite
def selections(draw):
    """Any span and density, spread evenly at random or in clusters."""
    span = draw(st.integers(1, 200_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.one_of(st.floats(0, 1), st.floats(-6, 0).map(lambda e: 10.0**e)))
    marks = rng.random(span) < density
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, span - 1)), draw(st.integers(1, 5000))
        marks[start : start + length] = draw(st.booleans())
    return np.flatnonzero(marks), span


@settings(max_examples=200, deadline=None)
@given(selections())
def test_decode_is_the_inverse_of_encode(selection):
    check_inverse(*selection)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 40)), st.integers(0, 30))
def test_every_small_set_comes_back(positions, more):
    check_inverse(sorted(positions), max(positions, default=0) + 1 + more)


@pytest.mark.parametrize("span", [1, 2, 7, 8, 9, 65_536, 2**36])
def test_ends_of_a_range(span):
    for positions in ([], [0], [span - 1], sorted({0, span - 1})):
        check_inverse(positions, span)
    if span < 2**20:
        check_inverse(np.arange(span), span)


@pytest.mark.parametrize("gap", sorted({2**e + d for e in range(4, 20) for d in (-1, 0, 1)} | {254, 509, 510, 511}))
@pytest.mark.parametrize("kept", [1, 2, 300])
def test_where_the_low_bits_grow_by_one(gap, kept):
    """Equal gaps of 2**e, where one more low bit is taken, and of multiples of 255, the byte that says go on."""
    positions = np.arange(kept) * (gap + 1) + gap
    for more in (0, 1, gap):
        check_inverse(positions, int(positions[-1]) + 1 + more)


@pytest.mark.parametrize("far", [200, 254, 255, 256, 510, 10**6, 2**34])
def test_a_gap_far_from_the_others(far):
    near = np.arange(64) * 3
    for positions in (
        np.append(near, near[-1] + far),
        np.append(0, near + far),
        np.append(near, near + near[-1] + far),
    ):
        check_inverse(positions, int(positions[-1]) + 1)


def test_codings_by_density():
    span = 1000
    codings = {k: encode_positions(np.arange(k, dtype=np.int64), span)[0] for k in (0, 1, 199, 200, 999, 1000)}
    assert codings == {0: GAPS, 1: GAPS, 199: GAPS, 200: BITMAP, 999: BITMAP, 1000: ALL}


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.95, 0.99, 0.995, 0.999])
def test_independent_entries_cost_their_entropy(rate):
    """Measured: 0.0, 1.2, 1.3, 0.5, 0.4, 0.3 % above log2 of the number of ways, heads of the streams counted."""
    rng, span = np.random.default_rng(0), round(200_000 / (1 - rate))
    positions = np.flatnonzero(rng.random(span, dtype=np.float32) >= rate)
    kept = len(positions)
    values = [torch.zeros(kept, dtype=torch.bfloat16)]
    blob = np.frombuffer(encode_chunk(span, positions, values, "bfloat16", seeded=False), dtype=np.uint8)
    head = read_head(blob, 0, span, seeded=False)
    np.testing.assert_array_equal(decode_chunk(blob, head, lambda stored: [stored]).positions[0], positions)
    share = kept / span
    shannon = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * span / 8
    assert head.stored(values=False) <= 1.05 * shannon
    assert head.stored(values=False) <= 1.02 * position_entropy(span, kept) / 8


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([ALL, GAPS, BITMAP]),
    st.integers(0, 255),
    st.binary(max_size=40),
    st.binary(max_size=40),
    st.integers(0, 40),
    st.one_of(st.integers(1, 400), st.integers(1, 2**62)),
)
@example(GAPS, 0, bytes(3), b"", 3, 3)
@example(GAPS, 58, bytes(2), b"\xff" * 15, 2, 2**62)
def test_any_bytes_are_a_sorted_set_or_refused(coding, shift, first, second, kept, span):
    """Gaps count what lies between two positions, so equal or descending ones cannot be written down at all."""
    limits = largest_streams(coding, shift, kept, span)
    assert sum(limits) <= 2 * kept + 2 + kept * shift
    raw = [np.frombuffer(data, dtype=np.uint8) for data in (first, second)][: len(limits)]
    if coding == ALL and kept != span:
        with pytest.raises(ValueError, match=f"{kept} kept of {span} entries"):
            decode_positions(coding, shift, raw, kept, span)
        return
    if any(len(s) > most for s, most in zip(raw, limits, strict=True)):
        return  # refused before it comes here
    with suppress(ValueError):
        assert is_sorted_set(decode_positions(coding, shift, raw, kept, span), kept, span)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(10, 60), st.randoms(use_true_random=False))
def test_damaged_gaps_are_a_sorted_set_or_refused(kept, gap, random):
    """Bytes of the right number, so that the arithmetic is reached, and sums that would pass 2**63."""
    span = min(kept << gap, 2**62)
    coding, shift, (high, low) = encode_positions(np.linspace(0, span - 1, kept + 1)[:-1].astype(np.int64), span)
    high, low = high.copy(), low.copy()
    for stream in (high, low):
        for _ in range(random.randint(0, 4) if len(stream) else 0):
            stream[random.randrange(len(stream))] = random.choice([0, 1, 127, 254, 255])
    if random.random() < 0.3:
        low[:] = 255
    with suppress(ValueError):
        assert is_sorted_set(decode_positions(coding, shift, [high, low], kept, span), kept, span)


@pytest.mark.parametrize(
    ("coding", "shift", "streams", "kept", "span", "message"),
    [
        (ALL, 0, [], 3, 4, "3 kept of 4"),
        (BITMAP, 0, [b"\x07"], 2, 8, "marks 3 entries, 2 were stated"),
        (BITMAP, 0, [b"\x07\x00"], 3, 8, "bitmap of 2 bytes"),
        (BITMAP, 0, [b"\x80"], 1, 7, "marks 0 entries"),
        (GAPS, 0, [b"\x01", b""], 2, 9, "end 1 gaps, 2 were stated"),
        (GAPS, 0, [b"\x01\x01\x01", b""], 2, 9, "end 3 gaps, 2 were stated"),
        (GAPS, 0, [b"\x01\x01\xff", b""], 2, 999, "end 2 gaps"),
        (GAPS, 0, [b"\x04\x04", b""], 2, 9, "position 9 of 9"),
        (GAPS, 0, [b"\xfe\xfe", b""], 2, 9, "beyond the 9 entries"),
        (GAPS, 1, [b"\x00\x00", b"\x00"], 2, 9, "no 1 low bits"),
        (GAPS, 1, [b"\x00\x00", b""], 2, 900, "no 1 low bits in 0 bytes"),
        (GAPS, 60, [b"\x00\x00", b"\xff" * 15], 2, 2**62, "no 60 low bits"),
    ],
)
def test_streams_that_say_otherwise_are_refused(coding, shift, streams, kept, span, message):
    raw = [np.frombuffer(s, dtype=np.uint8) for s in streams]
    with pytest.raises(ValueError, match=message):
        decode_positions(coding, shift, raw, kept, span)


def test_limits_grow_with_the_kept_entries_alone():
    """A file that claims 2**60 entries may not claim streams for them."""
    for coding in (SEED, ALL, GAPS, BITMAP):
        assert sum(largest_streams(coding, 0, 1000, 2**60)) <= 1300
