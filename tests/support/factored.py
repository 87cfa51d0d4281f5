"""Deltas of the tiny pair some of whose tensors are the product of two factors."""

from dataclasses import replace

import torch
from tiny import pair

from dpp_lightning import SparseDelta, prune
from dpp_lightning.delta.contents import SparseTensor
from dpp_lightning.tensors.factors import Factors, matrix_shape
from dpp_lightning.tensors.flat_entries import EntriesHash, gather_entries
from dpp_lightning.tensors.names import canonical_tensors


def factored_pair(
    method="magnitude", rate=0.9, *, dtype=None, factors_dtype=None, drawn_rate=None, rest=False, rank=2, seed=1
):
    """Base and delta: rank 2 in the matrices of the layers, biases of the layers whole, kept entries elsewhere.

    A ranked selection also keeps entries beside the factors of matrices; a seeded one draws at ``drawn_rate`` and has
    some there with ``rest`` alone.
    """
    base, finetuned = pair(seed=seed)
    delta = prune(base, finetuned, method, drawn_rate or rate, seed=4, dtype=dtype, carry=["head.*"])
    generator = torch.Generator().manual_seed(seed)
    tensors, check, values = {}, EntriesHash(), canonical_tensors(base)
    for name, sparse in delta.tensors.items():
        tensors[name] = sparse
        if name.startswith("layers."):
            tensors[name] = _with_factors(name, sparse, delta.info.seeded and not rest, rank, factors_dtype, generator)
        check.update(gather_entries(values[name], tensors[name].changed))
    info = replace(
        delta.info,
        pruning_rate=rate,
        drawn_rate=drawn_rate,
        rest=rest,
        factors_dtype=factors_dtype,
        base_check=check.hexdigest(()),
        base_first=check.first,
    )
    return base, SparseDelta(tensors, delta.carried, info, delta.new_rows)


def _with_factors(name, sparse, alone, rank, dtype, generator):
    rows, columns = matrix_shape(sparse.shape)
    if columns == 1:
        factors = Factors.whole(0.01 * torch.randn(rows, generator=generator))
    else:
        left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        factors = Factors(0.01 * left, right)
    factors = factors.rounded(dtype, name)
    if alone or columns == 1:
        return SparseTensor(sparse.shape, sparse.indices[:0], sparse.values[:0], factors)
    return replace(sparse, factors=factors)
