"""Statistics of a delta's entries, beside those that numpy gives of all entries at once."""

import numpy as np
import pytest
import torch

from dpp_lightning.analysis.entry_statistics import EntryStatistics
from dpp_lightning.methods.tensor_pair import BLOCK, TensorPair


def test_statistics_of_blocks_are_those_of_all_entries_together():
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(BLOCK + 1000, generator=generator) * 1e-3 + 2e-4, torch.randn(7, generator=generator)]
    pairs = [TensorPair.of(str(i), torch.zeros_like(delta), delta) for i, delta in enumerate(deltas)]
    found, entries = EntryStatistics.of(pairs), torch.cat(deltas).double().numpy()
    assert found.mean_abs == pytest.approx(np.abs(entries).mean())
    assert found.variance == pytest.approx(entries.var())
    assert (found.min, found.max) == pytest.approx((entries.min(), entries.max()))
    assert (found.p10, found.p90) == pytest.approx(tuple(np.quantile(entries, [0.1, 0.9])), rel=4e-3)


def test_quantiles_on_either_side_of_zero_have_their_sign():
    delta = torch.tensor([-4.0] * 3 + [0.0] * 4 + [2.0] * 3)
    found = EntryStatistics.of([TensorPair.of("w", torch.zeros(10), delta)])
    assert found.p10 == pytest.approx(-4.0, rel=4e-3)
    assert found.p90 == pytest.approx(2.0, rel=4e-3)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_no_entries_and_entries_that_are_not_finite_have_no_statistics(values):
    delta = torch.tensor(values)
    with pytest.raises(ValueError, match="has no entries, or weights that are not finite"):
        EntryStatistics.of([TensorPair.of("w", torch.zeros_like(delta), delta)])
