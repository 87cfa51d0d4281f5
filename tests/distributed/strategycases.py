"""Jobs for the tests of strategies: a small net fitted as any strategy shares it out, always on the same batches."""

import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from tiny import Foreign, blobs
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from dpp_lightning.callbacks import DeltaPruneCallback, WritePredictions
from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
from dpp_lightning.tensors.names import without_wrappers
from dpp_lightning.tensors.shards import full_tensor, local_tensor, reshard
from dpp_lightning.trainer.strategies import FSDP2Strategy

MONITOR = "acc/dataloader_idx_0"
RANK_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class CPUFSDP(FSDPStrategy):
    """Lightning's FSDP1, which refuses CPUs; with ``state_dict_type="full"`` its optimizer states alias each other."""

    def _setup_model(self, model):
        settings = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
        return FullyShardedDataParallel(model, **settings)


STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "fsdp2-folder": lambda: FSDP2Strategy(save_distributed_checkpoint=True),
    "ddp_fork": lambda: "ddp_fork",
    "ddp_spawn": lambda: "ddp_spawn",
    "forkserver": lambda: DDPStrategy(start_method="forkserver"),
    "fsdp1": lambda: CPUFSDP(auto_wrap_policy={nn.Linear}, state_dict_type="sharded"),
    "fsdp1-flat": lambda: CPUFSDP(use_orig_params=False, state_dict_type="sharded"),
}


class Shared(Foreign):
    """Scored on two validation sets; a layer a unit of FSDP2."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(optimizer=partial(AdamR, delta_decay=1e-3))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for module in [*(layer for layer in self.net if isinstance(layer, nn.Linear)), self.net]:
                fully_shard(module, mesh=mesh)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("acc", self.accuracy(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_acc", self.accuracy(batch), sync_dist=True)

    def accuracy(self, batch):
        return (self.net(batch[0]).argmax(1) == batch[1]).float().mean()


class Data(pl.LightningDataModule):
    """Batches of 40 (of 32 in training) over all ranks, none with fillers."""

    def loader(self, samples, start, size):
        world, data = self.trainer.world_size, blobs(samples, start)
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, size // world, sampler=sampler)

    def train_dataloader(self):
        return self.loader(640, 0, 32)

    def val_dataloader(self):
        return [self.loader(200, 1000, 40), self.loader(80, 1400, 40)]

    def test_dataloader(self):
        return self.loader(200, 1000, 40)


class Watch(pl.Callback):
    """Which hooks were called at the end, and this rank's weights and optimizer state when training ended."""

    def __init__(self):
        self.ends = []

    def on_train_end(self, trainer, pl_module):
        self.ends.append("train")
        reshard(pl_module)
        self.weights, self.state = local_weights(pl_module), optimizer_states(trainer)

    def on_fit_end(self, trainer, pl_module):
        self.ends.append("fit")

    def teardown(self, trainer, pl_module, stage):
        self.ends.append(f"teardown {stage}")


def local_weights(module):
    """This rank's shard of every tensor."""
    return {name: local_tensor(t).detach().clone() for name, t in module.state_dict().items()}


def optimizer_states(trainer):
    """This rank's shard of every tensor of the optimizers' state, by parameter."""
    return [
        {name: local_tensor(tensor).clone() for name, tensor in state.items()}
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
    ]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_trainer(strategy, callbacks, **settings):
    world = 1 if strategy == "single" else int(os.environ.get("WORLD_SIZE", 2))
    settings = {"max_epochs": 2, "logger": False, **settings}
    return pl.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[strategy](), callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, **settings,
    )  # fmt: skip


def prune(folder, **settings):
    return DeltaPruneCallback(
        **{"method": ["dare", "darex-q"], "pruning_rate": 0.9, "monitor": "acc", "output_dir": folder, **settings}
    )


@contextmanager
def recorded_uploads():
    """Inside the block nothing is uploaded: the ids of the repositories go to a list."""
    uploads = []

    def record(folder, repo_id, *, private):
        assert Path(folder, "delta_config.json").exists()
        uploads.append(repo_id)
        return "somewhere"

    room = "dpp_lightning.callbacks.prune_run"
    with patch(f"{room}.hub_upload.upload_folder", record), patch(f"{room}.trainer_checks.check_can_upload"):
        yield uploads


def watched_fit(strategy, folder, pruned):
    """A fit with all that might notice the extra passes, then a test; what they saw, and what is left."""
    os.makedirs(folder, exist_ok=True)
    watch, module, delta = Watch(), Shared(), prune(f"{folder}/deltas", push_to_hub="user/name")
    saved = ModelCheckpoint(f"{folder}/saved", "{step}", monitor=MONITOR, mode="max", save_top_k=-1)
    stop = EarlyStopping(MONITOR, patience=100, mode="max")
    trainer = make_trainer(
        strategy, [delta] * pruned + [saved, stop, watch], logger=CSVLogger(folder, "log", "0"), log_every_n_steps=5,
        limit_val_batches=2, limit_test_batches=2, accumulate_grad_batches=2, gradient_clip_val=0.5, val_check_interval=0.5,
    )  # fmt: skip
    with recorded_uploads() as uploads:
        trainer.fit(module, datamodule=Data())
    ends = list(watch.ends)
    reshard(module)
    weights = {name: full_tensor(t).detach().clone() for name, t in module.state_dict().items()}
    kept = same(local_weights(module), watch.weights)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    tested = trainer.test(module, datamodule=Data(), verbose=False)[0]["test_acc"]
    return {
        "ends": ends,
        "kept": kept,
        "weights": weights,
        "metrics": metrics,
        "tested": tested,
        "uploads": uploads,
        "stop": (stop.wait_count, float(stop.best_score)),
        "best": (Path(saved.best_model_path).name, float(saved.best_model_score), len(saved.best_k_models)),
        "rows": [(r.method, r.q, r.score, r.num_kept) for r in delta.results],
    }


def watched_fits(strategy, folder):
    """The same fit without and with the callback."""
    return [watched_fit(strategy, f"{folder}/{name}", name == "with") for name in ("without", "with")]


def launching_fit(strategy, folder):
    """A fit that starts its ranks itself, and a test after it; what the process that started them is left with."""
    for name in (*RANK_VARIABLES, "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    module, delta = Shared(), prune(f"{folder}/deltas")
    trainer = make_trainer(strategy, [delta], enable_checkpointing=False)
    trainer.fit(module, datamodule=Data())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = {name: t.detach().clone() for name, t in module.state_dict().items()}
    results = Path(folder, "deltas", "results.jsonl")
    before = results.stat().st_mtime_ns
    tested = trainer.test(module, datamodule=Data(), verbose=False)[0]["test_acc"]
    again = results.stat().st_mtime_ns != before
    return {"metrics": metrics, "weights": weights, "tested": tested, "again": again, "results": len(delta.results)}


def averaged_fit(strategy, folder):
    """A fit with a moving average of the weights; scores of the rows, and the score of the weights that are left."""
    module, delta = Shared(), prune(f"{folder}/deltas", method="dare")
    trainer = make_trainer(
        strategy, [EMAWeightAveraging(decay=0.9), delta], enable_checkpointing=False, max_epochs=4
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    tested = trainer.test(module, datamodule=Data(), verbose=False)[0]["test_acc"]
    return {"scores": [row.score for row in delta.results], "tested": tested}


def best_fit(strategy, folder):
    """The best weights pruned (those of the worst epoch, surely not the last); what was, and what is left."""
    watch, module = Watch(), Shared()
    delta = prune(f"{folder}/deltas", ckpt="best", method="dare")
    best = ModelCheckpoint(f"{folder}/saved", monitor=MONITOR, mode="min")
    trainer = make_trainer(strategy, [best, watch, delta], max_epochs=3)
    trainer.fit(module, datamodule=Data())
    reshard(module)
    return {
        "kept": same(local_weights(module), watch.weights),
        "state": all(same(a, b) for a, b in zip(optimizer_states(trainer), watch.state, strict=True)),
        "best": float(best.best_model_score),
        "path": best.best_model_path,
        "scores": [row.score for row in delta.results],
        "weights": {name: full_tensor(t).detach().clone() for name, t in module.state_dict().items()},
    }


def plain_fit(strategy, epochs, resumed_from, saved_to):
    """A fit with AdamR to an epoch, and its checkpoint; whole weights by name."""
    module = Shared()
    trainer = make_trainer(strategy, [], max_epochs=epochs, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, datamodule=Data(), ckpt_path=resumed_from)
    if saved_to:
        trainer.save_checkpoint(saved_to)
    if not strategy.startswith("fsdp1"):
        return {name: t.detach().clone() for name, t in module.state_dict().items()}
    with FullyShardedDataParallel.summon_full_params(trainer.strategy.model, writeback=False):
        return {without_wrappers(name): p.detach().clone() for name, p in module.named_parameters()}


def refused_fit(strategy, folder, pruned):
    """What a fit is refused with, and whether a training step was taken."""
    module = Shared()
    trainer = make_trainer(strategy, [prune(folder)] * pruned, enable_checkpointing=False)
    try:
        trainer.fit(module, datamodule=Data())
    except ValueError as error:
        return str(error), trainer.global_step
    return "not refused", trainer.global_step


def glue_fit(strategy, base, data, epochs, resumed_from, saved_to):
    """A GLUE fit with the callback to an epoch, from a checkpoint if one is named; weights and theta_0, whole."""
    world = 1 if strategy == "single" else int(os.environ["WORLD_SIZE"])
    delta = prune(f"{saved_to}-deltas", monitor="val_score", method=["dare", "darex-q"], calibration_samples=8)
    trainer = make_trainer(strategy, [delta], max_epochs=epochs, enable_checkpointing=False, num_sanity_val_steps=0)
    module = GLUEModule("sst2", base, optimizer=lambda groups: AdamR(groups, lr=1e-2), scheduler="constant", seed=0)
    trainer.fit(module, GLUEDataModule(path=data, batch_size=16 // world, seed=0), ckpt_path=resumed_from)
    reshard(module)
    theta0 = {name: trainer.optimizers[0].state[p].get("pretrained") for name, p in module.named_parameters()}
    trainer.save_checkpoint(saved_to)
    return {
        "weights": {name: full_tensor(p).detach().clone() for name, p in module.named_parameters()},
        "pretrained": {name: full_tensor(t).detach().clone() for name, t in theta0.items() if t is not None},
        "rows": [(row.method, row.q, row.score) for row in delta.results],
    }


class Predicting(Shared):
    """Also predicts."""

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def fit_in_the_log_folder(strategy, folder):
    """A fit and predictions that are written where the logger writes, which a trainer asks all of its ranks."""
    delta, module = prune(None, method="dare"), Predicting()
    trainer = make_trainer(strategy, [delta, WritePredictions()], logger=CSVLogger(folder, "log", "0"), max_epochs=1)
    trainer.fit(module, datamodule=Data())
    trainer.predict(module, DataLoader(blobs(8), 4))
    return len(delta.results)
