"""What the tests of DeltaPruneCallback share: callbacks for the tiny models, their weights, and a look at the end of fit."""

import lightning.pytorch as pl
import torch

from dpp_lightning.callbacks import DeltaPruneCallback
from dpp_lightning.optim import AdamR


def adamr(parameters, lr):
    return AdamR(parameters, lr=lr, delta_decay=0.01)


def callback(folder, **settings):
    return DeltaPruneCallback(**{"method": "dare", "monitor": "acc", "output_dir": str(folder), **settings})


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


class Spy(pl.Callback):
    """Weights, copies of the base in the optimizer's state, and training mode when training ends, before pruning."""

    def on_train_end(self, trainer, pl_module):
        self.weights = weights(pl_module)
        self.theta0 = [s["pretrained"].clone() for s in trainer.optimizers[0].state.values() if "pretrained" in s]
        self.training = pl_module.training
