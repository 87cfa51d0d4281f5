"""Tiny models and data for the tests."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def pair(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.01):
    """A base and a fine-tuned network of odd shapes: matrices, biases, a norm, an embedding, a scalar, an empty tensor."""
    torch.manual_seed(seed)
    base, finetuned = Net().to(dtype), Net().to(dtype)
    with torch.no_grad():
        for a, b in zip(base.parameters(), finetuned.parameters(), strict=True):
            b.copy_(a + scale * torch.randn_like(a))
    return base, finetuned


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(37, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 33), nn.ReLU(), nn.Linear(33, 8)) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x).mean(1)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(self.norm(h) * self.gain)


class Foreign(pl.LightningModule):
    """A LightningModule as any user may write one, with nothing but what Lightning asks for."""

    def __init__(self, learning_rate=3e-3, optimizer=None, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(20, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
        )
        self.learning_rate, self.optimizer = learning_rate, optimizer or torch.optim.Adam

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=self.learning_rate)


def blobs(samples: int, start: int = 0):
    """Some of 2000 points in 20 dimensions, in three classes that a linear map tells apart."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(2000, 20, generator=generator), torch.randn(20, 3, generator=generator)
    y = (x @ w).argmax(1)
    return TensorDataset(x[start : start + samples], y[start : start + samples])


def train_loader(samples: int = 600):
    return DataLoader(blobs(samples), 32, shuffle=True)


def val_loader(samples: int = 200):
    return DataLoader(blobs(samples, 1000), 100)


def trainer(*callbacks, **settings):
    """A trainer on the CPU that prints, logs and saves nothing, unless the settings say so."""
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 2, **defaults, **settings})
