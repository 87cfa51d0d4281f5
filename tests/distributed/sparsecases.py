"""A job for the tests of SparseTraining on several ranks."""

from strategycases import Data, Shared, local_weights, make_trainer

from dpp_lightning.callbacks import SparseTraining


def sparse_fit(strategy, mask):
    """The weights after a fit of a tenth of the entries with accumulated and clipped gradients, and those before."""
    module, sparse = Shared(), SparseTraining(mask, 0.9)
    before = local_weights(module)
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_val_batches": 0}
    make_trainer(strategy, [sparse], enable_checkpointing=False, **settings).fit(module, datamodule=Data())
    return before, local_weights(module), sparse.num_kept
