"""Steps as functions of (seed, epoch, step): the order, the random numbers, and a whole fit that is killed and resumed."""

import random

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_glue import make_data, make_model, make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.optimization import linear_warmup_decay, parameter_groups
from dpp_lightning.tasks.common.reproducible import (
    EpochDataLoader,
    EpochSampler,
    EvaluationSampler,
    resolve_seed,
    restore_positions,
    seed_step,
)
from dpp_lightning.tasks.glue import GLUEDataModule, GLUEModule


def order(n, seed, epoch, **settings):
    sampler = EpochSampler(n, seed, **settings)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("lengths", [None, [i % 17 for i in range(101)]])
def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone(lengths):
    torch.manual_seed(1)
    first = order(101, 3, 2, lengths=lengths, batch_size=8)
    torch.manual_seed(2)
    assert first == order(101, 3, 2, lengths=lengths, batch_size=8)
    assert sorted(first) == list(range(101))
    others = [order(101, seed, epoch, lengths=lengths, batch_size=8) for seed, epoch in [(3, 3), (4, 2), (2, 3)]]
    assert all(first != other for other in others)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_ranks_share_one_order_and_take_equally_many_steps(n, replicas):
    shares = [order(n, 0, 1, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    assert {len(share) for share in shares} == {len(EpochSampler(n, 0, num_replicas=replicas))}
    dealt = [sample for step in zip(*shares, strict=True) for sample in step]
    assert dealt[:n] == order(n, 0, 1)
    assert set(dealt) == set(range(n))


def test_length_grouping_puts_similar_lengths_into_a_batch_and_long_batches_anywhere():
    lengths = torch.randint(1, 100, (1600,), generator=torch.Generator().manual_seed(0))
    grouped = lengths[order(1600, 0, 0, lengths=lengths.tolist(), batch_size=16)].view(-1, 16)
    plain = lengths[order(1600, 0, 0)].view(-1, 16)
    padding = [float((batch.max(1).values[:, None] - batch).sum() / batch.sum()) for batch in (grouped, plain)]
    assert padding[0] < 0.05 < 0.5 < padding[1]
    halves = grouped.float().mean(1).view(2, -1).mean(1)
    assert abs(float(halves[0] - halves[1])) < 20


def test_a_short_batch_of_grouped_lengths_stays_the_last():
    batches = list(
        DataLoader(range(35), batch_size=8, sampler=EpochSampler(35, 0, lengths=list(range(35)), batch_size=8))
    )
    assert [len(batch) for batch in batches] == [8, 8, 8, 8, 3]
    assert all(int(batch.max() - batch.min()) == len(batch) - 1 for batch in batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [1, 2]}, "2 lengths for 5 samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_replicas": 2, "rank": 2}, "rank"),
    ],
)
def test_sampler_refuses_what_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(5, 0, **settings)


@pytest.mark.parametrize("n", [1, 7, 8])
@pytest.mark.parametrize("replicas", [2, 3])
def test_evaluation_meets_every_sample_once_and_marks_the_fillers(n, replicas):
    shares = [list(EvaluationSampler(n, num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for i in share if i >= 0) == list(range(n))
    assert all(-n <= i for share in shares for i in share)


def test_random_numbers_of_a_step_depend_on_seed_epoch_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return (*torch.rand(4).tolist(), *np.random.rand(2).tolist(), random.random())

    torch.rand(3)
    reference = draw(5, 1, 2, 0)
    assert draw(5, 1, 2, 0) == reference
    others = [
        draw(5, 2, 2, 0),
        draw(5, 1, 2, 1),
        draw(5, 1, 3, 0),
        draw(6, 0, 2, 0),
        draw(4, 2, 2, 0),
        draw(5, 2, 1, 0),
    ]
    assert all(set(reference).isdisjoint(other) for other in others)


def test_seed_falls_back_to_seed_everything_then_to_zero(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert (resolve_seed(7), resolve_seed(None)) == (7, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert (resolve_seed(7), resolve_seed(None)) == (7, 11)


class Noisy(pl.LightningModule):
    """Remembers what it was given and draws a random number in every step."""

    def __init__(self, workers):
        super().__init__()
        self.layer, self.workers, self.seen = nn.Linear(1, 1), workers, []

    def train_dataloader(self):
        data = TensorDataset(torch.arange(18.0)[:, None])
        return EpochDataLoader(data, batch_size=4, sampler=EpochSampler(18, 0), num_workers=self.workers)

    def on_train_start(self):
        restore_positions(self.trainer)

    def on_train_batch_start(self, batch, batch_idx):
        seed_step(0, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch[0].flatten().tolist(), float(torch.rand(()))))
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # noqa: B018  (it makes the loader before the epoch is restored)
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"max_epochs": -1, "max_steps": 15}], ids=["epochs", "steps"])
def test_a_fit_resumed_after_any_step_has_its_own_order_and_numbers(tmp_path, workers, settings):
    settings = {"max_epochs": 3, **settings}
    whole = Noisy(workers)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    make_trainer(tmp_path, callbacks=[checkpoint], **settings).fit(whole)
    assert len({tuple(numbers) for _, numbers, _ in whole.seen}) == 15
    for step in (1, 4, 5, 7, 10, 14) if workers == 0 else (7,):
        resumed = Noisy(workers)
        trainer = make_trainer(tmp_path, enable_checkpointing=False, **settings)
        trainer.fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], step
        assert trainer.global_step == 15


def test_the_rest_of_an_epoch_is_not_read_again_and_the_next_epoch_is_whole():
    class Counted(TensorDataset):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            return super().__getitem__(i)

    data = Counted(torch.arange(18))
    loader = EpochDataLoader(data, batch_size=4, sampler=EpochSampler(18, 0))
    first = [batch[0].tolist() for batch in loader]
    loader.load_state_dict({"epoch": 0, "batches": 3, "samples_per_step": 4})
    data.read = 0
    assert [batch[0].tolist() for batch in loader] == first[3:]
    assert data.read == 6
    assert loader.state_dict() == {"epoch": 0, "batches": 5, "samples_per_step": 4}
    assert [batch[0].tolist() for batch in loader] == first
    plain = EpochDataLoader(data, batch_size=4)
    plain.load_state_dict({"epoch": 0, "batches": 3, "samples_per_step": 4})
    assert [batch[0].tolist() for batch in plain] == [[12, 13, 14, 15], [16, 17]]


def test_a_position_of_steps_of_another_size_is_refused_in_its_epoch_alone():
    loader = EpochDataLoader(range(18), batch_size=4, sampler=EpochSampler(18, 0, num_replicas=2))
    loader.load_state_dict({"epoch": 0, "batches": 2, "samples_per_step": 16})
    with pytest.raises(ValueError, match="had 16 samples on all ranks together, here they have 8"):
        next(iter(loader))
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3


class Kill(pl.Callback):
    """Stops the fit in the middle of epoch 1, as a crash does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 5:
            raise RuntimeError("killed")


KINDS = {
    "at an epoch's end": ({}, {}, {}, "epoch=0"),
    "after validation": ({"monitor": "val_score", "mode": "max"}, {}, {}, "epoch=0"),
    "grouped by length": ({"every_n_train_steps": 3}, {}, {"length_grouped": True}, "step=12"),
    "between validations": ({"every_n_train_steps": 3}, {"val_check_interval": 2}, {}, "step=12"),
    "after a validation in an epoch": (
        {"monitor": "val_score", "mode": "max"},
        {"val_check_interval": 2},
        {},
        "step=13",
    ),
    "accumulated gradients": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}, {}, "step=7"),
}


@pytest.mark.parametrize(("saving", "settings", "data_settings", "last"), KINDS.values(), ids=KINDS)
def test_fit_killed_and_resumed_gives_the_weights_of_the_whole_fit(
    tmp_path, monkeypatch, saving, settings, data_settings, last
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base, data = make_model(tmp_path / "base"), make_data(tmp_path / "data", "cola")

    def fit(name, ckpt_path=None, callbacks=()):
        pl.seed_everything(0, verbose=False)
        module = GLUEModule("cola", base, optimizer=lambda groups: AdamR(groups, lr=1e-3))
        filename = "{epoch}" if last.startswith("epoch") else "{step}"
        checkpoint = ModelCheckpoint(tmp_path / name, filename=filename, save_top_k=-1, **saving)
        trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[checkpoint, *callbacks], **settings)
        trainer.fit(module, GLUEDataModule(path=data, batch_size=8, **data_settings), ckpt_path=ckpt_path)
        optimizer_state = trainer.optimizers[0].state_dict()["state"]
        return module.state_dict(), optimizer_state

    weights, state = fit("whole")
    with pytest.raises(RuntimeError, match="killed"):
        fit("broken", callbacks=[Kill()])
    torch.manual_seed(99)
    resumed_weights, resumed_state = fit("resumed", ckpt_path=tmp_path / "broken" / f"{last}.ckpt")
    for name, value in weights.items():
        assert torch.equal(value, resumed_weights[name]), name
    for index, entries in state.items():
        assert all(torch.equal(value, resumed_state[index][name]) for name, value in entries.items())


def test_groups_hold_every_trainable_parameter_once_and_mark_the_new_ones():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1))
    module[0].weight.requires_grad_(False)
    old, new = parameter_groups(module, ["2.weight", "2.bias"])
    assert [tuple(p.shape) for p in old["params"]] == [(3,), (4, 3), (4,)]
    assert [tuple(p.shape) for p in new["params"]] == [(1, 4), (1,)]
    assert (old.get("new", False), new["new"]) == (False, True)
    assert [len(group["params"]) for group in parameter_groups(module, [])] == [5]
    assert parameter_groups(nn.Linear(2, 2), ["weight", "bias"])[0]["new"]


def test_groups_see_through_a_compiled_module_and_refuse_unknown_names():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    compiled = nn.ModuleDict({"model": torch.compile(module)})
    assert len(parameter_groups(compiled, ["model.1.weight"])[1]["params"]) == 1
    with pytest.raises(ValueError, match=r"\['head.weight'\]"):
        parameter_groups(module, ["head.weight"])
    with pytest.raises(ValueError, match="requires_grad"):
        parameter_groups(module.requires_grad_(False), [])


def test_learning_rate_rises_then_falls_linearly_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = linear_warmup_decay(optimizer, 100, 0.06)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:7] == pytest.approx([2.0 * i / 6 for i in range(7)])
    assert rates[6:] == pytest.approx([2.0 * (100 - i) / 94 for i in range(6, 101)])


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0.06), (float("inf"), 0.06), (10, 1.5), (10, -0.1)])
def test_schedule_refuses_impossible_settings(steps, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="expected"):
        linear_warmup_decay(optimizer, steps, warmup)
