"""Kept values to bytes and back: bit for bit as floats, within half a step as integers, a bit each where they are
equal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpp_lightning.delta.coding.chunk import decode_chunk, encode_chunk, read_head
from dpp_lightning.delta.coding.values import PLANES, SIGNS, decode_values, encode_values, stream_count
from dpp_lightning.tensors.dtypes import FLOATS, INTEGERS, fake_quantize

FLOAT_NAMES = list(FLOATS)
EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00, "float64": 0x7FF0000000000000}
TINY = float(torch.finfo(torch.bfloat16).smallest_normal)


def from_bits(bits, dtype):
    """A tensor of these bits; one exponent bit is taken from what would not be finite."""
    bits = np.array(bits, dtype=f"<u{FLOATS[dtype].itemsize}")
    infinite = (bits & EXPONENT[dtype]) == EXPONENT[dtype]
    bits[infinite] ^= EXPONENT[dtype] & -EXPONENT[dtype]
    return torch.from_numpy(bits.view(np.uint8)).view(FLOATS[dtype])


def bits_of(values):
    return values.contiguous().view(torch.uint8).tolist()


def back(values, dtype):
    form, streams = encode_values(values, dtype)
    assert len(streams) == stream_count(dtype, form)
    assert all(s.dtype == np.uint8 for s in streams)
    return form, decode_values(dtype, form, streams, [v.numel() for v in values])


def stored_bits(values, dtype):
    """Bits a value in the file, and the values as they come out of it."""
    kept = sum(v.numel() for v in values)
    blob = np.frombuffer(encode_chunk(kept, np.arange(kept), values, dtype, seeded=False), dtype=np.uint8)
    head = read_head(blob, 0, kept, seeded=False)
    ends = np.cumsum([v.numel() for v in values])
    return 8 * head.stored(values=True) / kept, decode_chunk(blob, head, lambda p: np.split(p, ends[:-1])).values


@st.composite
def floats(draw):
    """Values of a few tensors: any finite bits, with more or fewer that share a magnitude."""
    dtype = draw(st.sampled_from(FLOAT_NAMES))
    unsigned = np.dtype(f"u{FLOATS[dtype].itemsize}")
    special = [0, 1, EXPONENT[dtype] - 1, 1 << (8 * unsigned.itemsize - 1), (1 << (8 * unsigned.itemsize - 1)) + 1]
    number = st.one_of(st.sampled_from(special), st.integers(0, 2 ** (8 * unsigned.itemsize) - 1))
    values = []
    for count in draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)):
        bits = draw(arrays(unsigned, count, elements=number))
        equal = draw(arrays(np.bool_, count)) | draw(st.booleans())
        signs = draw(arrays(np.bool_, count)).astype(unsigned) << (8 * unsigned.itemsize - 1)
        usual = draw(number) & (special[3] - 1)
        values.append(from_bits(np.where(equal, usual | signs, bits).astype(unsigned), dtype))
    return dtype, values


@settings(max_examples=300, deadline=None)
@given(floats())
def test_floats_come_back_bit_for_bit(case):
    """-0.0, subnormals and the largest numbers included, in both forms."""
    dtype, values = case
    _, read = back(values, dtype)
    assert read.dtype == FLOATS[dtype]
    assert bits_of(read) == bits_of(torch.cat(values))


@pytest.mark.parametrize("dtype", FLOAT_NAMES)
@pytest.mark.parametrize("exceptions", [0.0, 0.01, 0.4])
def test_one_magnitude_a_tensor_costs_a_bit_a_value(dtype, exceptions):
    """As after importance sampling: below the cap all values of a tensor are equal but for their signs."""
    rng = torch.Generator().manual_seed(0)
    values, magnitudes = [], (0.25, 3e-3, 1.5)
    for magnitude in magnitudes:
        sign = torch.where(torch.rand(20_000, generator=rng) < 0.5, -1.0, 1.0)
        capped = torch.rand(20_000, generator=rng) < exceptions
        values.append((sign * torch.where(capped, 2 + torch.rand(20_000, generator=rng), magnitude)).to(FLOATS[dtype]))
    form, read = back(values, dtype)
    assert form == SIGNS
    assert bits_of(read) == bits_of(torch.cat(values))
    bits, read = stored_bits(values, dtype)
    assert bits_of(read) == bits_of(torch.cat(values))
    others = sum(int((v.float().abs() >= 2).sum()) for v in values) / 60_000
    flags = 0.0 if not exceptions else min(1.0, 10 * exceptions)
    assert bits <= 1.03 + flags + 8 * FLOATS[dtype].itemsize * others


def test_values_of_many_magnitudes_stay_planes():
    form, _ = back([torch.randn(1000, generator=torch.Generator().manual_seed(0))], "float32")
    assert form == PLANES
    form, _ = back([torch.tensor([1.0, -1.0, 1.0, 7.0]), torch.tensor([2.0])], "float32")
    assert form == SIGNS


@pytest.mark.parametrize(("dtype", "most"), [("float32", 28.0), ("bfloat16", 11.5), ("float16", 14.5)])
def test_the_exponents_of_a_delta_take_few_bits(dtype, most):
    """Measured on normal deltas: 27.0, 11.0 and 13.4 bits a value where the numbers have 32, 16 and 16."""
    delta = 1e-3 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    bits, read = stored_bits([delta.to(FLOATS[dtype])], dtype)
    assert bits < most
    assert torch.equal(read, delta.to(FLOATS[dtype]))


def tensors(values):
    """Lists of values as tensors of float32."""
    return [torch.tensor(v, dtype=torch.float32) for v in values]


number_lists = st.lists(
    st.lists(
        st.one_of(
            st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1e-45])
        ),
        min_size=1,
        max_size=300,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(number_lists, st.sampled_from(list(INTEGERS)))
def test_integers_err_by_half_a_step_at_most_and_are_stable(lists, dtype):
    values = tensors(lists)
    near = [fake_quantize(v, dtype) for v in values]
    for value, rounded in zip(values, near, strict=True):
        top, group = INTEGERS[dtype]
        for piece, held in zip(value.split(group), rounded.split(group), strict=True):
            step = float((piece.abs().max() / top).bfloat16())
            assert float((piece - held).abs().max()) <= 0.5001 * step + top * TINY
        assert bits_of(fake_quantize(rounded, dtype)) == bits_of(rounded)
    _, read = back(values, dtype)
    assert bits_of(read) == bits_of(torch.cat(near))
    first, again = encode_values(values, dtype), encode_values(near, dtype)
    assert [s.tolist() for s in first[1]] == [s.tolist() for s in again[1]]


def test_a_scale_reaches_no_further_than_its_group_and_tensor():
    small, large = torch.full((32,), 1e-3), torch.full((32,), 1e3)
    assert torch.allclose(fake_quantize(torch.cat([small, large]), "int4")[:32], small, rtol=0.01)
    _, read = back([small[:5], large[:5]], "int4")
    assert torch.allclose(read, torch.cat([small[:5], large[:5]]), rtol=0.01)


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-45, 1e37])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_extreme_numbers_are_finite_and_stable(scale, dtype):
    values = scale * torch.linspace(-1, 1, 301)
    near = fake_quantize(values, dtype)
    assert bool(torch.isfinite(near).all())
    assert (
        float((near - values).abs().max()) <= float(values.abs().max()) / INTEGERS[dtype][0] + INTEGERS[dtype][0] * TINY
    )
    assert bits_of(fake_quantize(near, dtype)) == bits_of(near)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOAT_NAMES)
@pytest.mark.parametrize("others", [[1.0, 2.0], [1.0, 1.0]])
def test_floats_that_are_not_finite_are_refused(dtype, bad, others):
    """In planes, and with signs both among the exceptions and as the usual magnitude."""
    for numbers in ([*others, bad], [bad, bad, bad]):
        form, streams = encode_values([torch.tensor(numbers, dtype=FLOATS[dtype])], dtype)
        with pytest.raises(ValueError, match="not finite"):
            decode_values(dtype, form, streams, [3])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_scales_and_integers_out_of_range_are_refused(dtype):
    top, group = INTEGERS[dtype]
    form, streams = encode_values([torch.linspace(-1, 1, 2 * group + 1)], dtype)
    for bad in (float("inf"), float("nan")):
        _, scales = encode_values([torch.tensor([1.0, 2.0, bad], dtype=torch.bfloat16)], "bfloat16")
        with pytest.raises(ValueError, match="not finite"):
            decode_values(dtype, form, [streams[0], *scales], [2 * group + 1])
    _, scales = encode_values([torch.tensor([1.0, 2.0, 3e38], dtype=torch.bfloat16)], "bfloat16")
    assert streams[0].view(np.int8)[-1] == top
    with pytest.raises(ValueError, match="not finite"):
        decode_values(dtype, form, [streams[0], *scales], [2 * group + 1])
    for bad in (-128, top + 1) if top < 127 else (-128,):
        integers = streams[0].copy()
        integers.view(np.int8)[0] = bad
        with pytest.raises(ValueError, match=f"{dtype} beyond {top}"):
            decode_values(dtype, form, [integers, *streams[1:]], [2 * group + 1])
    with pytest.raises(ValueError, match="form"):
        decode_values(dtype, SIGNS, streams, [2 * group + 1])


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("equal", [False, True])
def test_streams_of_other_lengths_are_refused(dtype, equal):
    values = [torch.ones(70) if equal else torch.arange(70.0), torch.ones(9) if equal else torch.arange(9.0)]
    form, streams = encode_values([v.to(FLOATS.get(dtype, torch.float32)) for v in values], dtype)
    for index, stream in enumerate(streams):
        for wrong in (np.append(stream, stream[-1:]) if len(stream) else np.zeros(1, np.uint8), stream[:-1]):
            if len(wrong) == len(stream):
                continue
            with pytest.raises(ValueError, match=r"bytes"):
                decode_values(dtype, form, [*streams[:index], wrong, *streams[index + 1 :]], [70, 9])
    for counts in ([300, 9], [60, 9], [70, 9, 1]):
        with pytest.raises(ValueError, match=r"bytes"):
            decode_values(dtype, form, streams, counts)
