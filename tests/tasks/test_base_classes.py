"""What all tasks' modules and data modules have from their base classes: loaders, refusals, public names."""

import subprocess
import sys

import datasets
import lightning.pytorch as pl
import pytest
import torch
from tiny_glue import make_data, make_model, make_trainer

import dpp_lightning.tasks
from dpp_lightning.tasks import (
    DigitsDataModule,
    GLUEDataModule,
    GLUEModule,
    ImageDataModule,
    InstructionDataModule,
)
from dpp_lightning.tasks.common import FineTuningModule, ScoredModule, TaskDataModule

DATA_MODULES = {
    "digits": DigitsDataModule,
    "glue": GLUEDataModule,
    "images": lambda **settings: ImageDataModule("images", **settings),
    "instructions": InstructionDataModule,
}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Squares(TaskDataModule):
    """Numbers and their squares, with lengths where the test wants some."""

    def __init__(self, sizes, tokens=None, **settings):
        super().__init__(4, 3, {"val": 0.2, "calibration": 0.1}, split_seed=0, seed=0, **settings)
        self.sizes, self.tokens = sizes, tokens

    def setup(self, stage=None):
        self.splits = {split: torch.arange(size) for split, size in self.sizes.items()}

    def samples(self, split, order=None):
        return self.splits[split] if order is None else self.splits[split][order]

    def lengths(self, split):
        return None if self.tokens is None else self.tokens[: len(self.splits[split])]


def values(loader):
    return torch.cat(list(loader)).tolist()


def test_scored_splits_are_sorted_by_length_and_others_keep_their_order():
    data = Squares({"train": 8, "val": 4, "calibration": 4, "test": 4}, tokens=[9, 1, 5, 1, 2, 2, 2, 2])
    data.setup()
    assert values(data.val_dataloader()) == values(data.test_dataloader()) == [1, 3, 2, 0]
    assert values(data.predict_dataloader()) == values(data.calibration_dataloader()) == [0, 1, 2, 3]
    assert sorted(values(data.train_dataloader())) == list(range(8))
    data.tokens = None
    assert values(data.val_dataloader()) == [0, 1, 2, 3]


def test_splits_without_samples_have_no_loader():
    data = Squares({"train": 8, "val": 0})
    data.setup()
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []
    with pytest.raises(ValueError, match=r"calibration_fraction 0\.1 holds out no sample; raise it"):
        data.calibration_dataloader()


def test_workers_live_on_only_where_samples_do_not_depend_on_the_epoch():
    data = Squares({"train": 8}, num_workers=1)
    data.setup()
    assert data.train_dataloader().persistent_workers

    class Augmented(torch.utils.data.TensorDataset):
        def set_epoch(self, epoch):
            pass

    data.splits["train"] = Augmented(torch.arange(8))
    assert not data.train_dataloader().persistent_workers


@pytest.mark.parametrize("make", DATA_MODULES.values(), ids=DATA_MODULES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, eval_batch_size .*expected at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size 0, expected at least 1"),
        ({"val_fraction": -0.1}, r"val_fraction -0\.1, calibration_fraction .*expected fractions of at least 0"),
        ({"calibration_fraction": float("nan")}, "calibration_fraction nan.*expected fractions"),
        ({"val_fraction": 0.6, "calibration_fraction": 0.4}, "together below 1"),
    ],
)
def test_a_setting_means_the_same_in_every_data_module(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("make", DATA_MODULES.values(), ids=DATA_MODULES)
def test_the_order_has_the_seed_given_or_that_of_seed_everything(make, seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    data = make(seed=seed, split_seed=5)
    monkeypatch.setattr(data, "samples", lambda split, order=None: torch.arange(8))
    assert data.train_dataloader().sampler.seed == (11 if seed is None else seed)
    assert data.split_seed == 5


def test_loaders_that_a_task_does_not_score_are_refused(tmp_path):
    base, path = make_model(tmp_path / "base"), make_data(tmp_path / "data", "cola")
    data = GLUEDataModule("cola", path, tokenizer=base)
    data.setup()
    loaders, module = [data.val_dataloader()] * 2, GLUEModule("cola", base, seed=0)
    with pytest.raises(ValueError, match="GLUEModule scores 1 val loader, but the data has more"):
        make_trainer(tmp_path).validate(module, loaders, verbose=False)
    with pytest.raises(ValueError, match="GLUEModule scores 1 test loader, but the data has more"):
        make_trainer(tmp_path).test(module, loaders, verbose=False)


@pytest.mark.parametrize("cls", [ScoredModule, FineTuningModule, TaskDataModule])
def test_base_classes_cannot_be_made(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


def test_every_public_name_is_a_module_data_module_or_setting():
    names = dpp_lightning.tasks.__all__
    assert names == sorted(names) == dir(dpp_lightning.tasks)
    for name in set(names) - {"LoRA"}:
        cls = getattr(dpp_lightning.tasks, name)
        assert issubclass(cls, pl.LightningDataModule if name.endswith("DataModule") else pl.LightningModule)
    with pytest.raises(AttributeError, match="no attribute 'GLUEModel'; it offers AdaMergingModule"):
        dpp_lightning.tasks.GLUEModel  # noqa: B018


def test_a_name_loads_the_libraries_of_its_own_task_alone():
    program = (
        "import sys, dpp_lightning.tasks as tasks; heavy = ('lightning', 'timm', 'torchvision', 'transformers')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
        "tasks.InstructionDataModule; assert 'timm' not in sys.modules and 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
