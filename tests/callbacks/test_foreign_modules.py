"""DeltaPruneCallback in modules and trainers as people have them: flags, loggers, loaders and DataModules of their own."""

import copy
import time

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import CombinedLoader
from tiny import Foreign, train_loader, trainer, val_loader
from torch.utils.data import DataLoader

from dpp_lightning import SparseDelta
from dpp_lightning.callbacks import DeltaPruneCallback


def prune_at_the_end(tmp_path, methods="dare", **settings):
    return DeltaPruneCallback(methods, 0.5, monitor="acc", output_dir=str(tmp_path / "deltas"), **settings)


@pytest.mark.parametrize("flag", [True, False, torch.nn.Identity()])
def test_a_flag_or_a_part_called_pretrained_says_nothing_of_the_base(tmp_path, flag):
    class Flagged(Foreign):
        def __init__(self):
            super().__init__()
            self.pretrained = flag

    module, callback = Flagged(), prune_at_the_end(tmp_path)
    trainer(callback).fit(module, train_loader(), val_loader())
    (row,) = [row for row in callback.results if row.pruning_rate]
    assert SparseDelta.from_pretrained(tmp_path / "deltas" / row.folder).info.base_name is None
    with pytest.warns(UserWarning, match="nothing tells which weights are the base"):
        trainer(prune_at_the_end(tmp_path / "again")).validate(Flagged(), val_loader())


def test_a_module_that_logs_by_its_own_logger_does_so_in_the_fit_alone(tmp_path):
    class Logging(Foreign):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.log_metrics({"foo": 1.0}, step=batch_idx)
            self.logger.experiment.log_metrics({"bar": 2.0}, step=batch_idx)

    callback = prune_at_the_end(tmp_path, ["dare", "darex-q"])
    logger = CSVLogger(str(tmp_path / "logs"))
    trainer(callback, logger=logger).fit(Logging(), train_loader(), val_loader())
    assert {row.method for row in callback.results if row.pruning_rate} == {"dare", "darex-q"}


@pytest.mark.parametrize("mode", ["sequential", "max_size"])
def test_a_combined_loader_serves_the_fit_and_the_rows(tmp_path, mode):
    class Two(Foreign):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            part = batch["a"] if isinstance(batch, dict) else batch
            self.log("acc", (self.net(part[0]).argmax(1) == part[1]).float().mean(), add_dataloader_idx=False)

    callback = prune_at_the_end(tmp_path)
    loaders = CombinedLoader({"a": val_loader(), "b": val_loader()} if mode != "sequential" else [val_loader()], mode)
    run = trainer(callback, max_epochs=2, num_sanity_val_steps=0)
    run.fit(Two(), train_loader(), loaders)
    assert len([row for row in callback.results if row.pruning_rate]) == 1


class Slow(TorchCheckpointIO):
    """Writes as on a slow disk."""

    def save_checkpoint(self, *args, **settings):
        time.sleep(0.5)
        super().save_checkpoint(*args, **settings)


def test_the_best_checkpoint_is_waited_for_while_a_thread_writes_it(tmp_path):
    best = ModelCheckpoint(str(tmp_path / "best"), monitor="acc", mode="max")
    callback = prune_at_the_end(tmp_path, ckpt="best")
    run = trainer(best, callback, enable_checkpointing=True, plugins=[AsyncCheckpointIO(Slow())])
    run.fit(Foreign(), train_loader(), val_loader())
    assert len([row for row in callback.results if row.pruning_rate]) == 1


def test_a_module_that_logs_nothing_in_the_sanity_check(tmp_path):
    class Late(Foreign):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                super().validation_step(batch, batch_idx)

    callback = prune_at_the_end(tmp_path)
    trainer(callback, num_sanity_val_steps=2).fit(Late(), train_loader(), val_loader())
    assert callback.results

    class Never(Foreign):
        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match="monitor='acc' was not logged"):
        trainer(prune_at_the_end(tmp_path / "b"), num_sanity_val_steps=2).fit(Never(), train_loader(), val_loader())


class Staged(pl.LightningDataModule):
    """Makes its training data in ``setup("fit")`` alone, as Lightning's own examples do."""

    def setup(self, stage):
        if stage == "fit":
            self.train = train_loader()
        self.val = val_loader()

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val


def test_a_run_without_a_fit_calibrates_on_a_data_module_that_makes_its_training_data_for_a_fit(tmp_path):
    base = {name: tensor.clone() for name, tensor in Foreign().state_dict().items()}
    torch.save(base, tmp_path / "base.pt")
    module = Foreign()
    trainer(max_epochs=1).fit(module, Staged())
    callback = prune_at_the_end(tmp_path, "darex-q", pretrained=str(tmp_path / "base.pt"))
    trainer(callback).validate(module, Staged())
    (row,) = [row for row in callback.results if row.pruning_rate]
    assert "train" in row.q_split


def test_a_precision_that_rounds_the_base_is_warned_of(tmp_path):
    callback = prune_at_the_end(tmp_path, forward_fn=lambda module, batch: module.net(batch[0]))
    with pytest.warns(
        UserWarning, match="torch.bfloat16, which rounds the base's values: the deltas fit the base cast"
    ):
        trainer(callback, precision="bf16-true").fit(Foreign(), train_loader(), val_loader())
    assert callback.results


def test_rows_are_scored_on_the_samples_of_one_order_and_training_keeps_its_own(tmp_path):
    """Of a validation loader that shuffles by a generator, which the training loader shares."""
    states = []
    for pruned in (False, True):
        generator = torch.Generator().manual_seed(0)
        train = DataLoader(train_loader().dataset, 20, shuffle=True, generator=generator)
        val = DataLoader(val_loader().dataset, 20, shuffle=True, generator=generator)
        callback = DeltaPruneCallback("dare", [0.0, 0.5], monitor="acc", output_dir=str(tmp_path / "deltas"))
        torch.manual_seed(0)
        module = Foreign()
        run = trainer(*([callback] if pruned else []), max_epochs=2, limit_val_batches=3, num_sanity_val_steps=0)
        run.fit(module, train, val)
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    whole, kept_all = (next(r for r in callback.results if r.method == m) for m in ("fine-tuned", "dare"))
    assert kept_all.pruning_rate == 0
    assert kept_all.score == whole.score


def test_methods_by_inputs_are_refused_before_training_where_no_input_is_known(tmp_path):
    class Computed(Foreign):
        def __init__(self):
            super().__init__()
            for part in self.net:
                if isinstance(part, torch.nn.Linear):
                    torch.nn.utils.parametrizations.weight_norm(part)

        def training_step(self, batch, batch_idx):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match=r"no weight of Computed is multiplied .*such as wanda"):
        trainer(prune_at_the_end(tmp_path, "wanda")).fit(Computed(), train_loader(), val_loader())


class OwnAverage(Foreign):
    """Keeps an average of its weights and evaluates that, as modules of diffusion models do."""

    def setup(self, stage):
        self.average = [p.detach().clone() for p in self.parameters()]

    def on_train_batch_end(self, *arguments):
        for average, p in zip(self.average, self.parameters(), strict=True):
            average.lerp_(p.detach(), 0.3)

    def on_validation_epoch_start(self):
        self.kept = [p.detach().clone() for p in self.parameters()]
        for average, p in zip(self.average, self.parameters(), strict=True):
            p.data.copy_(average)

    def on_validation_epoch_end(self):
        for kept, p in zip(self.kept, self.parameters(), strict=True):
            p.data.copy_(kept)


class InItsStep(OwnAverage):
    """The same inside the step, as torch_ema's context is used."""

    on_validation_epoch_end = Foreign.on_validation_epoch_end

    def on_validation_epoch_start(self):
        """Nothing."""

    def validation_step(self, batch, batch_idx):
        OwnAverage.on_validation_epoch_start(self)
        super().validation_step(batch, batch_idx)
        OwnAverage.on_validation_epoch_end(self)


@pytest.mark.parametrize("kind", [OwnAverage, InItsStep])
def test_a_module_that_evaluates_other_weights_than_its_own_is_refused_before_training(tmp_path, kind):
    module = kind()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"puts other weights in the place of net.0.bias, .*WeightAveraging"):
        trainer(prune_at_the_end(tmp_path)).fit(module, train_loader(), val_loader())
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_optimizer_with_weights_for_evaluation_is_refused_before_training(tmp_path):
    class ScheduleFree(torch.optim.Adam):
        def train(self):
            """As schedulefree has it."""

        eval = train

    with pytest.raises(ValueError, match=r"ScheduleFree holds other weights for evaluation than for training"):
        trainer(prune_at_the_end(tmp_path)).fit(Foreign(optimizer=ScheduleFree), train_loader(), val_loader())


@pytest.mark.parametrize("method", ["dare", "darex-q", "wanda"])
@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_what_a_module_does_at_the_end_of_a_validation_is_not_done_by_the_passes_before_training(
    tmp_path, method, sanity_steps
):
    class Stepping(Foreign):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            self.best, self.waited = 0.0, 0

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)]

        def lr_scheduler_step(self, *arguments):
            """By the hook below."""

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
                self.waited += 1
            if not self.trainer.sanity_checking:
                self.lr_schedulers().step()
                self.log("gap", self.trainer.callback_metrics["loss"])

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    ends = []
    for callbacks in ([], [prune_at_the_end(tmp_path, method)]):
        module = Stepping()
        torch.manual_seed(1)
        run = trainer(*callbacks, max_epochs=4, num_sanity_val_steps=sanity_steps)
        run.fit(module, train_loader(), val_loader())
        ends.append((module.net[0].weight.detach().clone(), module.waited))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] == 4


def test_an_average_that_is_made_in_training_is_refused_before_anything_is_pruned(tmp_path):
    class Later(OwnAverage):
        average, kept = (), ()

        def setup(self, stage):
            """Nothing."""

        def on_train_batch_end(self, *arguments):
            self.average = self.average or [p.detach().clone() for p in self.parameters()]
            super().on_train_batch_end()

        def on_validation_epoch_start(self):
            if self.average:
                super().on_validation_epoch_start()

        def on_validation_epoch_end(self):
            if self.average:
                super().on_validation_epoch_end()

    with pytest.raises(ValueError, match="puts other weights in the place of net"):
        trainer(prune_at_the_end(tmp_path)).fit(Later(), train_loader(), val_loader())
    assert not (tmp_path / "deltas" / "results.jsonl").exists()


def test_what_a_module_makes_in_its_first_validation_is_not_made_of_a_trial(tmp_path):
    class Lazy(Foreign):
        def __init__(self):
            super().__init__()
            self.teacher = None
            self.register_buffer("seen", torch.tensor(0))

        def validation_step(self, batch, batch_idx):
            if self.teacher is None:
                self.teacher = copy.deepcopy(self.net)
            self.seen += 1
            super().validation_step(batch, batch_idx)

        def on_train_start(self):
            states.append((self.teacher, int(self.seen)))

    states = []
    for callbacks in ([], [prune_at_the_end(tmp_path)]):
        trainer(*callbacks, num_sanity_val_steps=0, max_epochs=1).fit(Lazy(), train_loader(), val_loader())
    assert states == [(None, 0), (None, 0)]
