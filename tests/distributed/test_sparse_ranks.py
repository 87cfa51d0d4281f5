"""SparseTraining under DDP: all ranks train the same entries to the weights of one process."""

import distjobs
import pytest
import sparsecases
import torch
from strategycases import same

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("mask", ["random", "magnitude", "fisher", "diff-struct"])
def test_ranks_of_ddp_train_the_same_entries_as_one_process(mask):
    before, expected, num_kept = sparsecases.sparse_fit("single", mask)
    ranks = distjobs.run(sparsecases.sparse_fit, 2, "ddp", mask, lightning=True)
    assert len(ranks) == 2
    assert same(ranks[0][1], ranks[1][1])
    for start, weights, kept in ranks.values():
        assert same(start, before)
        assert kept == num_kept
        assert 0.9 * kept < sum(int((weights[name] != tensor).sum()) for name, tensor in before.items()) <= kept
        if mask != "fisher":  # whose squares are of the gradients of smaller batches on each rank
            for name, tensor in expected.items():
                torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
