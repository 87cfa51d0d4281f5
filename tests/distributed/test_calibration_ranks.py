"""All ranks calibrate on the same batch, whatever their own data and random state."""

import calibrationcases
import distjobs
import pytest


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["stream", "noise"])
def test_all_ranks_calibrate_on_the_first_ranks_batch(tmp_path, kind):
    results = distjobs.run(calibrationcases.fit, 2, kind, str(tmp_path), lightning=True)
    (batches, q), (others, other_q) = results[0], results[1]
    assert len(batches) == 1
    assert batches == others
    assert q == other_q
