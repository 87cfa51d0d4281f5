"""Fine-tuning any image classifier of timm."""

from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2 import MixUp

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.activation_checkpointing import checkpoint_activations
from dpp_lightning.tasks.common.optimization import Schedule, parameter_groups, with_schedule
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL, ReproducibleModule, resolve_seed
from dpp_lightning.tasks.common.sharding import shard_for_strategy
from dpp_lightning.tasks.vision.digits import DigitsDataModule
from dpp_lightning.tasks.vision.image_transforms import data_config
from dpp_lightning.tasks.vision.images import ImageDataModule
from dpp_lightning.tasks.vision.models import layer_before_head, load_model

__all__ = ["DigitsDataModule", "ImageDataModule", "VisionModule"]

Batch = tuple[Tensor, Tensor] | list[Tensor]


class VisionModule(ReproducibleModule):
    """A timm image classifier with a new head on a pre-trained body; its score is the accuracy.

    A batch is (images, labels): floats (samples, channels, height, width), integers (samples,); in training, labels may
    also be probabilities (samples, classes). Logs ``val_score`` and
    ``val_accuracy``, both the accuracy in [0, 1], and ``val_loss``, over the whole split and all ranks; the same as
    ``test_...``. Samples of label -100 take no part.

    Args:
        model_name: timm's name of the architecture; with a hub id or a folder that names one itself, leave it out.
        num_classes: number of outputs of the head.
        pretrained: the base. A ``.safetensors`` file; a ``.ckpt`` that a fit of this module wrote; a folder with timm's
            ``config.json`` and weights; the name of a file shipped with this package, such as
            ``vit_digits_base.safetensors``; else a hub id such as ``timm/vit_base_patch16_224.augreg_in21k``, with
            ``@revision`` behind it if need be. ``None`` starts from a random model, which then is the base.
        model_kwargs: what ``timm.create_model`` takes beyond that, such as ``img_size`` or ``drop_path_rate``.
        keep_head: take the head from the base as well, in place of a new one.
        optimizer: makes the optimizer from the groups of ``dpp_lightning.tasks.common.optimization.parameter_groups``.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler of your own is stepped each ``step`` or each ``epoch``.
        warmup_fraction: share of all steps, in [0, 1], of the warm-up of ``linear``.
        label_smoothing: of the training loss, in [0, 1]; of mixed labels too.
        mixup: alpha of mixup (https://arxiv.org/abs/1710.09412), whose shares are drawn from Beta(alpha, alpha) for
            each training batch; such as 0.2, and 0 for none.
        gradient_checkpointing: compute activations twice to save memory.
        seed: of the new head and of dropout; by default the one of ``seed_everything``, else 0.

    Attributes:
        new_parameter_names: the new head's parameters, e.g. ``model.head.weight``; none where the base has it.
        output_layer: submodule whose output goes into the head, e.g. ``model.fc_norm``.

    Raises:
        ValueError: an unknown architecture, or one that cannot compute activations twice; a base that is not there, or
            whose tensors do not fit the architecture.
    """

    def __init__(
        self,
        model_name: str | None = None,
        num_classes: int = 1000,
        pretrained: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        keep_head: bool = False,
        optimizer: OptimizerCallable = AdamR,
        scheduler: Schedule = "linear",
        scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_fraction: float = 0.06,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        gradient_checkpointing: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected a share in [0, 1], such as 0.1")
        if not 0.0 <= mixup < float("inf"):
            raise ValueError(f"mixup is {mixup}, expected an alpha of at least 0, such as 0.2, or 0 for none")
        self.pretrained, self.num_classes, self.seed = pretrained, num_classes, resolve_seed(seed)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.scheduler_interval, self.warmup_fraction = scheduler_interval, warmup_fraction
        self.label_smoothing = label_smoothing
        self.mixup = MixUp(alpha=mixup, num_classes=num_classes) if mixup else None
        self.save_hyperparameters("model_name", "num_classes", "pretrained", "model_kwargs", "keep_head", "seed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the new head is a function of the seed alone
            self.model, new_names = load_model(model_name, pretrained, num_classes, model_kwargs or {}, keep_head)
        if gradient_checkpointing:
            checkpoint_activations(self.model)
        self.new_parameter_names = tuple(f"model.{name}" for name in new_names)
        self.output_layer = f"model.{layer_before_head(self.model)}"
        self.metrics = nn.ModuleDict({split: _metrics(num_classes) for split in ("val", "test")})

    @property
    def data_config(self) -> dict[str, Any]:
        """How images are to be prepared, as :func:`dpp_lightning.tasks.vision.image_transforms.data_config`."""
        return data_config(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        return self.model(images)

    def configure_model(self) -> None:
        """Share the model out where the strategy is ``ModelParallelStrategy``."""
        shard_for_strategy(self, self.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy, of mixed images where ``mixup`` says so."""
        images, labels = batch if self.mixup is None else self.mixup(*batch)
        loss = functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the scores of the validation split."""
        self._update("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the scores of the test split."""
        self._update("test", batch)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Predicted class of every sample, (samples,), of images with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return cast(Tensor, self(images)).argmax(dim=-1)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted pass has left."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted pass has left."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        self._log_scores("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over two groups, pre-trained parameters and the new head, and its schedule."""
        optimizer = self.optimizer(parameter_groups(self, self.new_parameter_names))
        return with_schedule(optimizer, self.scheduler, self.scheduler_interval, self.trainer, self.warmup_fraction)

    def _update(self, split: str, batch: Batch) -> None:
        images, labels = batch
        real = labels != IGNORED_LABEL
        logits, labels = (
            self(images)[real].float(),
            labels[real],
        )  # where models are in shards, all ranks must call them
        if not len(labels):
            return
        metrics = cast(nn.ModuleDict, self.metrics[split])
        cast(Metric, metrics["accuracy"]).update(logits, labels)
        cast(Metric, metrics["loss"]).update(functional.cross_entropy(logits, labels, reduction="none"))

    def _log_scores(self, split: str) -> None:
        values = {name: cast(Metric, m).compute() for name, m in cast(nn.ModuleDict, self.metrics[split]).items()}
        for name, value in {**values, "score": values["accuracy"]}.items():
            self.log(f"{split}_{name}", value, prog_bar=name == "score", sync_dist=True)

    def _reset(self, split: str) -> None:
        for metric in cast(nn.ModuleDict, self.metrics[split]).values():
            cast(Metric, metric).reset()


def _metrics(num_classes: int) -> nn.ModuleDict:
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    return nn.ModuleDict({"accuracy": accuracy, "loss": MeanMetric(nan_strategy="disable")})  # of all samples
