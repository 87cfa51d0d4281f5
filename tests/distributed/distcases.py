"""Jobs that the tests run on several ranks: AdamR on one small net, whole and in shards of every kind."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dpp_lightning import prune
from dpp_lightning.optim import AdamR
from dpp_lightning.tensors.shards import reshard, shard_like

SAMPLES, STEPS = 16, 4


def make_net():
    """Biases of 16, 17 and 3 entries: uneven shards, and on four ranks empty ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 17), nn.ReLU(), nn.Linear(17, 3))


def make_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 8, generator=generator), torch.randn(SAMPLES, 3, generator=generator)


def share(net, kind):
    """The net as one strategy shares it out, and the ranks that see different samples."""
    if kind == "single":
        return net, 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(net), rank, world
    if kind.startswith("fsdp1"):
        strategy = ShardingStrategy[kind.removeprefix("fsdp1-")]
        settings = {"use_orig_params": True, "device_id": torch.device("cpu"), "sharding_strategy": strategy}
        return FullyShardedDataParallel(net, **settings), rank, world
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    if kind == "tp":
        parallelize_module(net, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        rank, world, mesh = mesh.get_local_rank("outer"), mesh.size(0), mesh["outer"]
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh), rank, world


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(kind, settings, steps=STEPS, head=False):
    """Weights, theta_0 and sums of v after some steps, whole, by name."""
    net, rank, world = share(make_net(), kind)
    named = dict(net.named_parameters())
    groups = [{"params": list(named.values())}]
    if head:
        groups = [
            {"params": [p for name, p in named.items() if ".4." not in f".{name}"]},
            {"params": [p for name, p in named.items() if ".4." in f".{name}"], "new": True},
        ]
    optimizer = AdamR(groups, lr=1e-2, **settings)
    for step in range(steps):
        x, y = (t.chunk(world)[rank] for t in make_batch(step))
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    sums = {
        n: optimizer.state[p]["exp_avg_sq_sum"].item()
        for n, p in named.items()
        if "exp_avg_sq_sum" in optimizer.state[p]
    }
    if kind.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(net):
            weights = {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in net.named_parameters()}
        return {"weights": weights}
    short = {name: name.removeprefix("module.") for name in named}
    return {
        "weights": {short[name]: whole(p) for name, p in named.items()},
        "pretrained": {
            short[n]: whole(optimizer.state[p]["pretrained"])
            for n, p in named.items()
            if "pretrained" in optimizer.state[p]
        },
        "sums": {short[name]: value for name, value in sums.items()},
        "parts": {short[name]: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in named.items()},
    }


def reductions(kind):
    """How many reductions one step of the optimizer takes."""
    net, _, _ = share(make_net(), kind)
    optimizer = AdamR(net.parameters())
    nn.functional.mse_loss(net(torch.ones(2, 8)), torch.zeros(2, 3)).backward()
    counted, real = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: counted.append(1) or real(*args, **kwargs)
    try:
        optimizer.step()
    finally:
        dist.all_reduce = real
    return len(counted)


def prune_in_shards(kind, method, rate):
    """Draw from nets in shards, apply to one, revert; what every rank then holds."""
    if kind != "single":
        dist.barrier()
    base, _, _ = share(make_net(), kind)
    finetuned, _, _ = share(make_net(), kind)
    with torch.no_grad():
        torch.manual_seed(1)
        for p in finetuned.parameters():
            change = 0.01 * torch.randn(p.shape)
            p.add_(shard_like(change, p))
    settings = {"a": 0.5, "b": 0.4} if method == "struct-dare" and rate == 0.8 else {}
    delta = prune(base, finetuned, method, rate, seed=3, carry="4.bias", blocks="*", **settings)
    before = {name: whole(p) for name, p in base.named_parameters()}
    delta.apply_(base)
    applied = {name: whole(p) for name, p in base.named_parameters()}
    delta.revert_(base)
    after = {name: whole(p) for name, p in base.named_parameters()}
    return {
        "indices": {name: t.indices for name, t in delta.tensors.items()},
        "values": {name: t.values for name, t in delta.tensors.items()},
        "carried": delta.carried,
        "applied": applied,
        "reverted": all(torch.equal(before[name], after[name]) for name in before),
        "fingerprint": delta.base_fingerprint,
    }


def refusal_in_shards(kind):
    """What every rank says of one NaN and one infinity, each in the shard of a single rank."""
    base, _, _ = share(make_net(), kind)
    finetuned, _, _ = share(make_net(), kind)
    with torch.no_grad():
        for p in finetuned.parameters():
            p.add_(0.01)
        for p, entry, value in ((finetuned[0].weight, 0, torch.nan), (base[2].weight, -1, torch.inf)):
            spoiled = whole(p)
            spoiled.view(-1)[entry] = value
            p.copy_(shard_like(spoiled, p))
    try:
        prune(base, finetuned, "dare", 0.9)
    except ValueError as error:
        return str(error)
    return "accepted"


def fit_glue(strategy, folder, base, data, settings):
    """A GLUE fit with the callback on the ranks of this job; scores, q and files."""
    import lightning.pytorch as pl

    from dpp_lightning.callbacks import DeltaPruneCallback
    from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
    from dpp_lightning.trainer.strategies import FSDP2Strategy

    callback = DeltaPruneCallback(
        method=["dare", "darex-q", "darex-q-layer", "wanda", "importance", "struct-darex-q"], pruning_rate=[0.5, 0.9], output_dir=folder,
        calibration_samples=8,
    )  # fmt: skip
    world = int(os.environ.get("WORLD_SIZE", 1))
    chosen = {
        "fsdp2": lambda: FSDP2Strategy(),
        "ddp": lambda: "ddp",
    }
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy=chosen.get(strategy, lambda: "auto")(), max_epochs=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    optimizer = settings.get("optimizer", AdamR)
    module = GLUEModule("sst2", base, optimizer=lambda groups: optimizer(groups, lr=1e-2), seed=0)
    trainer.fit(module, GLUEDataModule(path=data, batch_size=16 // world, seed=0, calibration_fraction=0.2))
    rows = [
        (r.method, r.pruning_rate, r.seed, r.q, round(r.score, 6), r.num_kept, r.num_bytes) for r in callback.results
    ]
    held = (
        {name: whole(p) for name, p in module.named_parameters()}
        if strategy != "single"
        else dict(module.named_parameters())
    )
    return {"rows": rows, "weights": {name: p.detach().clone() for name, p in held.items()}}


def fit_epochs(strategy, base, data, epochs, resumed_from, saved_to, every=None):
    """A GLUE fit to an epoch, from a checkpoint if one is named; weights and theta_0, whole, by name.

    Args:
        strategy: "single", "ddp" or "fsdp2".
        base, data: folders.
        epochs: number of them.
        resumed_from: checkpoint, or None.
        saved_to: the last checkpoint; those of every so many steps, ``step=N.ckpt``, lie beside it.
        every: number of steps.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule
    from dpp_lightning.trainer.strategies import FSDP2Strategy

    world = int(os.environ.get("WORLD_SIZE", 1)) if strategy != "single" else 1
    checkpoints = ModelCheckpoint(
        os.path.dirname(saved_to), "{step}", every_n_train_steps=every, save_top_k=-1, enable_version_counter=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, max_epochs=epochs, logger=False, enable_checkpointing=every is not None,
        callbacks=[checkpoints] if every else None,
        strategy=FSDP2Strategy() if strategy == "fsdp2" else {"single": "auto", "ddp": "ddp"}[strategy],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    module = GLUEModule("sst2", base, optimizer=lambda groups: AdamR(groups, lr=1e-2), scheduler="constant", seed=0)
    trainer.fit(module, GLUEDataModule(path=data, batch_size=16 // world, seed=0), ckpt_path=resumed_from)
    reshard(module)
    state = {name: trainer.optimizers[0].state[p] for name, p in module.named_parameters()}
    pretrained = {name: whole(s["pretrained"]) for name, s in state.items() if "pretrained" in s}
    weights = {name: whole(p) for name, p in module.named_parameters()}
    trainer.save_checkpoint(saved_to)
    return {"weights": weights, "pretrained": pretrained}


def fit_causal(strategy, folder, base, path, test_path):
    """A decoder's fit, its test by generation, and a delta; scores and q."""
    import lightning.pytorch as pl

    from dpp_lightning.callbacks import DeltaPruneCallback
    from dpp_lightning.tasks.causal_lm.data import InstructionDataModule
    from dpp_lightning.tasks.causal_lm.module import CausalLMModule
    from dpp_lightning.trainer.strategies import FSDP2Strategy

    world = int(os.environ.get("WORLD_SIZE", 1)) if strategy != "single" else 1
    prune = DeltaPruneCallback(
        method=["darex-q"], pruning_rate=0.5, scope="linear", output_measure="top-logits", calibration_samples=8,
        output_dir=folder,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, max_epochs=16, logger=False, enable_checkpointing=False, callbacks=[prune],
        strategy=FSDP2Strategy() if strategy == "fsdp2" else "auto", check_val_every_n_epoch=16,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = CausalLMModule(base, optimizer=lambda groups: AdamR(groups, lr=5e-3), max_new_tokens=12, seed=0)
    settings = {"prompt": "plain", "max_length": 32, "batch_size": 16 // world, "eval_batch_size": 5, "seed": 0}
    trainer.fit(module, InstructionDataModule(path, test_path=test_path, **settings))
    return [(row.method, row.q, row.score) for row in prune.results]
