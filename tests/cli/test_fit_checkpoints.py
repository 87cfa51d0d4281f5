"""What is said of checkpoints at the end of a fit whose weights diverged."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Foreign, train_loader, trainer, val_loader

from dpp_lightning.cli.fit_checkpoints import next_commands


class Diverging(Foreign):
    first_nan = 0

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step >= self.first_nan:
            with torch.no_grad():
                self.net[3].weight[5, 7] = float("nan")


@pytest.mark.parametrize(
    ("first_nan", "said"),
    [(10**6, "The checkpoint is "), (25, "The last finite checkpoint is "), (5, "is not finite (NaN or infinity)")],
)
def test_a_checkpoint_that_diverged_is_not_proposed_for_scoring(tmp_path, first_nan, said):
    module = Diverging()
    module.first_nan = first_nan
    kept = ModelCheckpoint(dirpath=str(tmp_path), save_top_k=-1, save_last=True, filename="{epoch}")
    best = ModelCheckpoint(dirpath=str(tmp_path / "best"), monitor="acc", mode="max")
    run = trainer(kept, best, enable_checkpointing=True)
    run.fit(module, train_loader(), val_loader())
    lines = next_commands(run, module).splitlines()
    assert said in lines[0]
    assert len(lines) == (1 if first_nan == 5 else 2)
    if first_nan == 25:
        named = lines[0].removeprefix(said)
        state = torch.load(named, weights_only=False)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())
        assert named in lines[1]
