"""A fit in several ranks with calibration data of a stream, or of items with noise; for the jobs of distjobs."""

import lightning.pytorch as pl
import torch
from tiny import Foreign, blobs, val_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dpp_lightning.callbacks import DeltaPruneCallback


class RankStream(IterableDataset):
    """Other points in each rank."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter(blobs(96, 96 * rank))


class RankNoise(Dataset):
    """Points with noise from the rank's own random state."""

    def __init__(self):
        self.data = blobs(96)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + torch.randn(20), y


def fit(kind, folder):
    """Sums of the batches that the output change is measured on, and q."""
    seen = []

    def forward(module, batch):
        seen.append(float(batch[0].sum()))
        return module.net(batch[0])

    pl.seed_everything(0, verbose=False)
    module = Foreign()
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    pruned = DeltaPruneCallback("darex-q", monitor="acc", output_dir=folder, forward_fn=forward)
    run = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[pruned], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(module, DataLoader(RankStream() if kind == "stream" else RankNoise(), 32), val_loader())
    return sorted(set(seen)), pruned.results[2].q
