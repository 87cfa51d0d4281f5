"""Base classes of the tasks' LightningModules: one that is scored over whole splits, one that also fine-tunes."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import PreTrainedModel

from dpp_lightning.tasks.common.activation_checkpointing import checkpoint_activations
from dpp_lightning.tasks.common.lora import LoRA, with_adapters
from dpp_lightning.tasks.common.optimization import Schedule, parameter_groups, with_schedule
from dpp_lightning.tasks.common.reproducible import resolve_seed, restore_positions, seed_step
from dpp_lightning.tasks.common.sharding import shard_for_strategy


class ScoredModule(LightningModule, ABC):
    """A module that logs the scores of a whole split, all batches and all ranks, when its pass ends.

    Attributes:
        metrics: prefix of the logged names, as :meth:`prefixes` gives them, to the scores of one loader: a module with
            ``update``, ``compute`` (values by name) and ``reset``, as torchmetrics has them.
    """

    metrics: nn.ModuleDict

    @abstractmethod
    def score_batch(self, split: str, batch: Any, dataloader_idx: int = 0) -> None:
        """Add a batch to the scores of its loader; called in every step of validation and test.

        Args:
            split: ``val`` or ``test``.
            batch: as the task's data module gives it.
            dataloader_idx: number of the loader within the split, from 0.
        """

    def prefixes(self, split: str) -> list[str]:
        """What the logged names begin with, for each loader of a split in the order of the loaders."""
        return [split]

    def scores(self, split: str, dataloader_idx: int = 0) -> Any:
        """The scores of one loader; ``None`` where the task has none for it.

        Raises:
            ValueError: the data has more loaders than the task scores.
        """
        prefixes = self.prefixes(split)
        if dataloader_idx >= len(prefixes):
            loaders = f"{len(prefixes)} {split} loader{'s' if len(prefixes) > 1 else ''}"
            raise ValueError(f"{type(self).__name__} scores {loaders}, but the data has more; leave the others out")
        return dict(self.metrics.items()).get(prefixes[dataloader_idx])

    def start_scoring(self, split: str) -> None:
        """Forget the batches of earlier passes, an interrupted one too; called when validation or test starts."""
        for scores in cast(Mapping[str, Any], self.metrics).values():
            scores.reset()

    def log_scores(self, split: str) -> None:
        """Log every value of every loader's scores; called when validation or test ends."""
        for index, prefix in enumerate(self.prefixes(split)):
            for name, value in self.scores(split, index).compute().items():
                self.log(f"{prefix}_{name}", value, prog_bar=name == "score", sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        """Start the scores of the validation split afresh."""
        self.start_scoring("val")

    def on_test_epoch_start(self) -> None:
        """Start the scores of the test split afresh."""
        self.start_scoring("test")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the scores of the validation split."""
        self.score_batch("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the scores of the test split."""
        self.score_batch("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole validation split."""
        self.log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole test split."""
        self.log_scores("test")


class FineTuningModule(ScoredModule):
    """A pre-trained model in fine-tuning, whose steps are functions of (seed, epoch, step, rank).

    So a fit that is resumed, in the middle of an epoch too, equals one that was never interrupted.

    Args:
        optimizer: makes the optimizer from the groups of :func:`parameter_groups`.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler that the user names is stepped each ``step`` or each ``epoch``.
        warmup_fraction: fraction of all steps, in [0, 1], that ``linear`` warms up in.
        seed: any integer; by default the one of ``seed_everything``, else 0.

    Attributes:
        model: the model that is trained, as :meth:`set_model` makes it.
        new_parameter_names: parameters, as in ``named_parameters()``, that the base does not hold.
        output_layer: submodule whose output is the last hidden representation.
    """

    model: nn.Module
    new_parameter_names: tuple[str, ...]
    output_layer: str

    def __init__(
        self,
        optimizer: OptimizerCallable,
        scheduler: Schedule,
        scheduler_interval: Literal["step", "epoch"],
        warmup_fraction: float,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.scheduler_interval, self.warmup_fraction = scheduler_interval, warmup_fraction
        self.seed = resolve_seed(seed)

    def set_model(
        self,
        model: nn.Module,
        new_names: Collection[str],
        output_layer: str,
        gradient_checkpointing: bool,
        lora: LoRA | None = None,
        task_type: str = "SEQ_CLS",
    ) -> None:
        """Take a model that holds the base's weights; to be called at the end of the subclass's ``__init__``.

        Args:
            model: of transformers or timm, changed in place.
            new_names: parameters of the model that the base does not hold.
            output_layer: submodule of the model whose output is the last hidden representation.
            gradient_checkpointing: compute activations twice to save memory.
            lora: train adapters and the new parameters, with the base frozen.
            task_type: peft's name of the task.

        Raises:
            ValueError: a model that cannot compute activations twice, or adapters for layers that it does not have.
        """
        if gradient_checkpointing:
            checkpoint_activations(model)
        if lora is not None:
            model, new_names, output_layer = with_adapters(
                cast(PreTrainedModel, model), lora, new_names, output_layer, self.seed, task_type
            )
        self.model = model
        self.new_parameter_names = tuple(sorted(f"model.{name}" for name in new_names))
        self.output_layer = f"model.{output_layer}"

    def configure_model(self) -> None:
        """Shard the model where the strategy is ``ModelParallelStrategy``."""
        shard_for_strategy(self, self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the pre-trained and the new parameters, a group each, and its schedule."""
        optimizer = self.optimizer(parameter_groups(self, self.new_parameter_names))
        return with_schedule(optimizer, self.scheduler, self.scheduler_interval, self.trainer, self.warmup_fraction)

    def on_train_start(self) -> None:
        """Continue the epoch of a checkpoint after the last batch before it."""
        restore_positions(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make what this step draws (dropout, mixup) a function of (seed, epoch, step, rank)."""
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
