"""The calibration batch is taken and tried before the first step, of loaders of any kind, and training does not notice."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from prune_fits import callback, equal, weights
from tiny import Foreign, blobs, trainer, val_loader
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
)


class Stream(IterableDataset):
    """Points in an order and with a noise of its own; it is used up once."""

    def __init__(self):
        self.generator, self.numpy = torch.Generator().manual_seed(3), np.random.default_rng(4)
        self.items = iter(blobs(320))

    def __iter__(self):
        for x, y in self.items:
            noise = torch.randn(20, generator=self.generator) + float(self.numpy.normal())
            yield x + 1e-2 * noise * torch.rand(()), y


class Noisy(Dataset):
    """Items with noise from generators of three kinds, one its own."""

    def __init__(self, size=320):
        self.data, self.generator = blobs(size), torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        noise = torch.randn(20, generator=self.generator) + torch.randn(20) + float(np.random.normal())
        return x + 1e-2 * noise, y


class Ragged(Dataset):
    """Sequences of points whose lengths differ from bucket to bucket."""

    def __init__(self):
        self.data = blobs(320)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x.repeat(1 + index // 32, 1), y


class Buckets(Sampler):
    """Batches of indices of one bucket, in random order."""

    def __iter__(self):
        return iter([list(range(32 * i, 32 * i + 32)) for i in torch.randperm(10).tolist()])

    def __len__(self):
        return 10


class Stateful(DataLoader):
    """As torchdata's: counts what it gave, and says so in a checkpoint. It counts only one iteration at a time."""

    given, iterations = 0, 0

    def __iter__(self):
        self.iterations += 1
        self.given = 0
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Pooled(Foreign):
    """Takes batches of points, and of sequences of points."""

    def training_step(self, batch, batch_idx):
        self.seen = [*getattr(self, "seen", []), batch[0].sum().item()]
        return super().training_step(self.pooled(batch), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(self.pooled(batch), batch_idx)

    def pooled(self, batch):
        x, y = batch
        return (x.mean(1) if x.dim() == 3 else x), y


class Several(Foreign):
    """Trains on batches of two loaders; validates on plain ones, or on both."""

    def training_step(self, batch, batch_idx):
        return sum(super(Several, self).training_step(b, batch_idx) for b in (batch["points"], batch["more"]))


class Both(Several):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["points"] if isinstance(batch, dict) else batch, batch_idx)


def no_batch_size(dataset):
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), 32, drop_last=False))


class ByBatch(Noisy):
    """Gives a whole batch for a list of indices."""

    def __getitem__(self, indices):
        items = [super(ByBatch, self).__getitem__(i) for i in indices]
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 32, shuffle=True, generator=torch.Generator().manual_seed(6)),
    "workers": lambda: DataLoader(Noisy(), 32, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Noisy(), 32, shuffle=True, num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), 32),
    "buckets": lambda: DataLoader(Ragged(), batch_sampler=Buckets()),
    "ragged": lambda: DataLoader(Ragged(), 1, shuffle=True),
    "no batch size": lambda: no_batch_size(ByBatch()),
    "stateful": lambda: Stateful(Noisy(), 32, shuffle=True),
    "stateful stream": lambda: Stateful(Stream(), 32),
}
SOURCES = {
    "shuffled": "64 items of train",
    "workers": "64 items of train",
    "persistent": "64 items of train",
    "stream": "the first batch of train",
    "buckets": "the first batch of train",
    "ragged": "the first batch of train",
    "no batch size": "the first batch of train",
    "stateful": "the first batch of train",
    "stateful stream": "the first batch of train",
}


class Watch(pl.Callback):
    """State of the loader after each step, the random state at the end of training, and the number of steps."""

    def __init__(self, loader):
        self.loader, self.states = loader, []

    def on_train_batch_end(self, *args):
        self.states.append(getattr(self.loader, "given", None))

    def on_train_end(self, trainer, pl_module):
        self.weights, self.random = weights(pl_module), (torch.get_rng_state().sum(), np.random.get_state()[2])


def watched_fit(kind, *callbacks):
    pl.seed_everything(7, verbose=False)
    module, loader = Pooled(dropout=0.2), LOADERS[kind]()
    watch = Watch(loader)
    run = trainer(watch, *callbacks, max_steps=15, max_epochs=2)
    run.fit(module, loader, val_loader())
    return module, watch, loader


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SOURCES)
def test_training_is_the_same_with_and_without_the_callback(tmp_path, kind):
    module, watch, loader = watched_fit(kind)
    pruned = callback(tmp_path, method="darex-q")
    other, beside, second = watched_fit(kind, pruned)
    assert other.seen == module.seen
    assert equal(beside.weights, watch.weights)
    assert beside.random == watch.random
    assert beside.states == watch.states
    assert getattr(second, "iterations", 0) == getattr(loader, "iterations", 0)
    assert {row.q_split for row in pruned.results if row.method == "darex-q"} == {SOURCES[kind]}


@pytest.mark.parametrize("method", ["darex-q", "darex-q-layer", "darex-learned", "wanda"])
@pytest.mark.parametrize("together", ["dict", "combined"])
@pytest.mark.parametrize("stream", [False, True])
def test_several_loaders_give_one_batch_of_all(tmp_path, method, together, stream):
    loaders = {"points": DataLoader(Stream() if stream else blobs(320), 32), "more": DataLoader(blobs(96, 320), 32)}
    training = CombinedLoader(loaders, "min_size") if together == "combined" else loaders
    pruned = callback(tmp_path, method=method, forward_fn=lambda m, batch: m.net(batch["points"][0]))
    trainer(pruned, max_epochs=1).fit(Both(), training, val_loader())
    if method != "wanda":
        expected = "the first batch of train" if stream else "64 items each of train"
        assert pruned.results[2].q_split == expected


@pytest.mark.parametrize("stream", [False, True])
def test_where_validation_does_not_take_the_batch_of_all_loaders_the_one_that_it_takes_is_named(tmp_path, stream):
    loaders = {"more": DataLoader(blobs(96, 320), 32), "points": DataLoader(Stream() if stream else blobs(320), 32)}
    pruned = callback(tmp_path, method="darex-q")
    with pytest.warns(
        UserWarning, match=r"does not take the batch of all training loaders \(KeyError.*train\['more'\]"
    ):
        trainer(pruned, max_epochs=1).fit(Several(), loaders, val_loader())
    assert pruned.results[2].q_split.endswith("train['more']")


class Other(Foreign):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch["points"], batch_idx)


def dicts(items):
    return {"points": torch.utils.data.default_collate(items)}


class DrawsItself(Foreign):
    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:The .dataloader_iter")
@pytest.mark.parametrize(
    ("module", "loader", "said"),
    [
        (
            Other,
            lambda: DataLoader(blobs(320), 32, collate_fn=dicts),
            r"calibration data \(64 items of train\).*KeyError",
        ),
        (Other, lambda: DataLoader(Stream(), 32, collate_fn=dicts), r"calibration data \(the first batch of train\)"),
        (DrawsItself, lambda: DataLoader(Stream(), 32), r"drawn by training_step\(dataloader_iter\)"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_first_step_with_the_cure(tmp_path, module, loader, said):
    module = module()
    before = weights(module)
    run = trainer(callback(tmp_path, method="darex-q"))
    with pytest.raises(ValueError, match=said + r".*calibration_dataloader=") as refused:
        run.fit(module, loader(), val_loader())
    assert "\n" not in str(refused.value)
    assert equal(weights(module), before)
    assert run.global_step == 0
    given = callback(tmp_path, method="darex-q", calibration_dataloader=DataLoader(blobs(64, 700), 32))
    trainer(given, max_epochs=1).fit(type(module)(), loader(), val_loader())
    assert given.results[2].q_split == "64 items of calibration_dataloader="


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibration_dataloader": []}, "calibration_dataloader= gives no batch"),
        ({"calibration_dataloader": DataLoader(blobs(0), 8)}, "calibration_dataloader= holds no items"),
        ({"calibration_dataloader": DataLoader(blobs(3), 3), "method": "darex-learned"}, "at least 4 samples, got 3"),
        ({"output_layer": "unused", "method": "darex-q"}, "'unused' was not called"),
        ({"objective": "metric", "calibration_dataloader": iter([])}, "list_iterator.*used up after one pass"),
        ({"objective": "metric", "calibration_dataloader": [torch.zeros(2)]}, "cannot be scored"),
        ({"forward_fn": lambda module, batch: module.net(batch["x"])}, "cannot be used: TypeError"),
    ],
)
def test_calibration_data_that_cannot_be_used_is_refused_before_the_first_step(tmp_path, settings, said):
    class WithUnused(Foreign):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.net(x)

    settings = {"output_layer": "net.5", **settings}
    run = trainer(callback(tmp_path, **{"method": "darex-q", **settings}))
    with pytest.raises(ValueError, match=said):
        run.fit(WithUnused(), DataLoader(blobs(320), 32), val_loader())
    assert run.global_step == 0


def test_only_items_that_the_sampler_draws_are_taken(tmp_path):
    """Training and validation data may be two subsets of one dataset."""
    allowed, seen = set(range(0, 320, 2)), []

    class Recorded(Noisy):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Recorded(), 32, sampler=SubsetRandomSampler(sorted(allowed)))
    trainer(callback(tmp_path, method="darex-q"), max_epochs=1).fit(Foreign(), loader, val_loader())
    assert seen
    assert set(seen) <= allowed


def test_the_training_loader_given_as_calibration_data_is_not_iterated_twice(tmp_path):
    loader = DataLoader(Stream(), 32)
    pruned = callback(tmp_path, method="darex-q", calibration_dataloader=loader)
    module = Pooled()
    trainer(pruned, max_epochs=1).fit(module, loader, val_loader())
    assert len(module.seen) == 10
    assert pruned.results[2].q_split == "the first batch of train"


def test_a_batch_that_the_step_changes_in_place_stays_as_the_loader_gave_it(tmp_path):
    class InPlace(Foreign):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 2, batch[1]] if self.trainer.training else batch

        def on_train_batch_end(self, outputs, batch, batch_idx):
            for x, _ in batches:
                x.zero_()

    class Once(IterableDataset):
        def __iter__(self):
            return iter(batches)

    def forward(module, batch):
        seen.append(batch[0].clone())
        return module.net(batch[0])

    seen, batches = [], list(DataLoader(blobs(320), 32))
    original = batches[0][0].clone()
    pruned = callback(tmp_path, method="darex-q", forward_fn=forward)
    trainer(pruned, max_epochs=1).fit(InPlace(), DataLoader(Once(), batch_size=None), val_loader())
    assert len(seen) > 3
    assert all(torch.equal(x, original) for x in seen)


def test_a_padding_collate_takes_items_of_any_length(tmp_path):
    def padded(items):
        return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])

    pruned = callback(tmp_path, method="darex-q")
    trainer(pruned, max_epochs=1).fit(Pooled(), DataLoader(Ragged(), 32, collate_fn=padded), val_loader())
    assert pruned.results[2].q_split == "64 items of train"
