"""The sum of the products of several deltas in one tensor, as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpp_lightning.tensors.factors import Factors, joined, matrix_shape


def sum_of_products(parts: Sequence[Factors], shape: tuple[int, ...]) -> Factors | None:
    """Factors of the sum, of no higher rank than a matrix of that shape has.

    Args:
        parts: factors of tensors of that shape.
        shape: of the tensor.

    Returns:
        Their columns and rows side by side; where these are more than the matrix has, the sum itself beside the
        identity. None where nothing is added.
    """
    if not parts:
        return None
    together, (rows, columns) = joined(list(parts)), matrix_shape(shape)
    if together.is_whole or 0 < together.rank <= min(rows, columns):
        return together
    if not together.rank:
        return None
    product = together.product().view(rows, columns)
    if rows <= columns:
        return Factors(torch.eye(rows), product)
    return Factors(product, torch.eye(columns))
