"""Factors: the product, the order of its numbers, and what a file holds of them."""

import pytest
import torch

from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.tensors.factors import Factors, joined, matrix_shape, stored_numbers


def factors(rows=6, columns=10, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))


@pytest.mark.parametrize(("shape", "matrix"), [((), (1, 1)), ((5,), (5, 1)), ((4, 3), (4, 3)), ((4, 3, 2, 2), (4, 12))])
def test_the_first_dimension_are_the_rows(shape, matrix):
    assert matrix_shape(shape) == matrix


@pytest.mark.parametrize(("start", "stop"), [(0, 60), (0, 1), (7, 31), (10, 20), (59, 60), (20, 20)])
def test_entries_are_a_range_of_the_product(start, stop):
    part = factors()
    whole = (part.left @ part.right).reshape(-1)
    assert torch.allclose(part.entries(start, stop), whole[start:stop])


def test_stored_numbers_go_by_direction_and_come_back():
    part = factors()
    columns, rows = part.stored()
    assert columns[:6].equal(part.left[:, 0])
    assert rows[:10].equal(part.right[0])
    assert part.numbers == columns.numel() + rows.numel() == stored_numbers(6, 10, 3)
    back = Factors.from_stored((6, 10), 3, [columns, rows])
    assert back.left.equal(part.left)
    assert back.right.equal(part.right)


def test_a_vector_is_held_whole():
    values = torch.randn(7)
    part = Factors.whole(values)
    assert part.is_whole
    assert part.numbers == 7
    assert [numbers.tolist() for numbers in part.stored()] == [values.tolist()]
    assert torch.equal(part.product(), values)
    assert torch.equal(Factors.from_stored((7,), 1, part.stored()).product(), values)


@pytest.mark.parametrize(("dtype", "steps"), [("int2", 4), ("int3", 6), ("int4", 14), ("int8", 254)])
def test_rounding_is_within_half_a_step_and_does_nothing_twice(dtype, steps):
    part = factors(64, 96, 2)
    rounded = part.rounded(dtype)
    for numbers, held in zip(part.stored(), rounded.stored(), strict=True):
        largest = float(numbers.abs().max())
        assert float((numbers - held).abs().max()) <= largest / steps * 1.02  # scales are bfloat16
    again = rounded.rounded(dtype)
    assert again.left.equal(rounded.left)
    assert again.right.equal(rounded.right)


def test_joined_factors_multiply_to_the_sum():
    one, two = factors(seed=1), factors(rank=2, seed=2)
    both = joined([one.scaled(0.5), two])
    assert both.rank == 5
    assert torch.allclose(both.product(), 0.5 * one.product() + two.product(), atol=1e-5)
    vectors = [Factors.whole(torch.tensor([1.0, 2.0])), Factors.whole(torch.tensor([3.0, 5.0]))]
    assert joined(vectors).product().tolist() == [4.0, 7.0]
    assert joined(vectors).is_whole


def test_kept_values_are_divided_by_q_and_the_product_is_not():
    part, indices = factors(), torch.tensor([1, 17, 42])
    tensor = SparseTensor((6, 10), indices, torch.tensor([1.0, 2.0, 3.0]), part)
    expected = part.product()
    expected[indices] += torch.tensor([1.0, 2.0, 3.0]) / 0.25
    assert torch.allclose(tensor.dense(0.25).reshape(-1), expected)
    assert tensor.changed.tolist() == list(range(60))
    assert tensor.stored_numbers == 3 + 48
    alone = SparseTensor((6, 10), indices, torch.tensor([1.0, 2.0, 3.0]))
    assert alone.changed is indices
    assert alone.dense(0.5).reshape(-1)[indices].tolist() == [2.0, 4.0, 6.0]
    assert int(alone.dense(0.5).count_nonzero()) == 3
