"""Kept entries are gathered and overwritten at flat positions in C order, whatever a tensor's memory looks like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpp_lightning.tensors.flat_entries import (
    EntriesHash,
    add_rescaled,
    gather_entries,
    group_by_device_and_dtype,
    scatter_entries,
)

LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 5),
    "transposed": lambda: torch.randn(5, 3).t(),
    "strided": lambda: torch.randn(6, 10)[::2, ::2],
    "scalar": lambda: torch.randn(()),
    "parameter": lambda: torch.nn.Parameter(torch.randn(3, 5)),
}


@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_and_scatter_address_entries_in_c_order(layout, indices):
    torch.manual_seed(0)
    tensor = LAYOUTS[layout]()
    positions = torch.randperm(tensor.numel())[: max(1, tensor.numel() // 2)].sort().values.to(indices)
    flat = tensor.detach().clone().flatten()
    assert torch.equal(gather_entries(tensor, positions), flat[positions.long()])
    values = torch.arange(1.0, len(positions) + 1)
    scatter_entries(tensor, positions, values)
    flat[positions.long()] = values
    assert torch.equal(tensor.detach().flatten(), flat)


def test_gathered_entries_are_a_copy():
    tensor = torch.zeros(4)
    gather_entries(tensor, torch.arange(4)).fill_(1.0)
    assert not tensor.any()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.01, 1.0), st.integers(0, 2**31 - 1)
)
def test_a_rescaled_delta_is_added_in_float32_and_rounded_once(base, q, seed):
    theta0 = torch.tensor(base, dtype=torch.bfloat16)
    values = torch.randn(len(base), generator=torch.Generator().manual_seed(seed)).bfloat16()
    expected = (theta0.float() + values.float() / q).bfloat16()
    assert torch.equal(add_rescaled(theta0, values, q), expected)


def test_a_float64_base_keeps_its_digits():
    base, values = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1e-12])
    assert add_rescaled(base, values, 0.5).item() == 1.0 + 2 * values.double().item()


def test_names_are_grouped_by_device_and_dtype_in_their_order():
    tensors = {"a": torch.ones(1), "b": torch.ones(1).half(), "c": torch.ones(2), "d": torch.ones(1, device="meta")}
    assert list(group_by_device_and_dtype(tensors)) == [["a", "c"], ["b"], ["d"]]


def test_the_hash_of_a_base_is_the_same_in_float32_and_knows_a_wrong_one_early():
    values = [torch.empty(0), torch.tensor([1.5, -2.0]), torch.tensor([3.0])]
    hashes = []
    for cast in (torch.Tensor.float, torch.Tensor.bfloat16):
        digest = EntriesHash()
        for tensor in values:
            digest.update(cast(tensor))
        hashes.append((digest.first, digest.hexdigest(())))
    assert hashes[0] == hashes[1]
    early = EntriesHash()
    assert early.first == ""
    early.update(values[0])
    assert early.first == "", "a tensor without kept entries says nothing about the base"
    early.update(values[1])
    assert early.first == hashes[0][0] == early.hexdigest(())
