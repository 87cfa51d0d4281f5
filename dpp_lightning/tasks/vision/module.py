"""Fine-tuning any image classifier of timm."""

from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import MixUp

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.module import FineTuningModule
from dpp_lightning.tasks.common.optimization import Schedule
from dpp_lightning.tasks.vision.image_transforms import data_config
from dpp_lightning.tasks.vision.models import layer_before_head, load_model
from dpp_lightning.tasks.vision.scores import ClassificationScores

Batch = tuple[Tensor, Tensor] | list[Tensor]


class VisionModule(FineTuningModule):
    """A timm image classifier with a new head on a pre-trained body; its score is the accuracy.

    A batch is (images, labels): floats (samples, channels, height, width), integers (samples,); in training, labels may
    also be probabilities (samples, classes). Logs ``val_score`` and ``val_accuracy``, both the accuracy in [0, 1], and
    ``val_loss``, over the whole split and all ranks; the same as ``test_...``. Samples of label -100 are not counted.

    Args:
        model_name: timm's name of the architecture; with a hub id or a folder that names one itself, leave it out.
        num_classes: number of outputs of the head.
        pretrained: the base. A ``.safetensors`` file; a ``.ckpt`` that a fit of this module wrote; a folder with timm's
            ``config.json`` and weights; the name of a file shipped with this package, such as
            ``vit_digits_base.safetensors``; else a hub id such as ``timm/vit_base_patch16_224.augreg_in21k``, which may
            end with ``@revision``. ``None`` starts from a random model, which then is the base.
        model_kwargs: further arguments of ``timm.create_model``, such as ``img_size`` or ``drop_path_rate``.
        keep_head: take the head from the base too, in place of a new one.
        optimizer: makes the optimizer from the groups of ``dpp_lightning.tasks.common.optimization.parameter_groups``.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler that you name is stepped each ``step`` or each ``epoch``.
        warmup_fraction: fraction of all steps, in [0, 1], that ``linear`` warms up in.
        label_smoothing: fraction, in [0, 1], by which labels are smoothed in the training loss, mixed labels too.
        mixup: alpha of mixup (https://arxiv.org/abs/1710.09412), whose weights are drawn from Beta(alpha, alpha) for
            each training batch; such as 0.2, and 0 for none.
        gradient_checkpointing: compute activations twice to save memory.
        seed: seed of the new head, dropout and mixup; by default the one of ``seed_everything``, else 0.

    Attributes:
        new_parameter_names: the new head's parameters, e.g. ``model.head.weight``; none where the base has it.
        output_layer: submodule whose output goes into the head, e.g. ``model.fc_norm``.

    Raises:
        ValueError: a setting outside its range; an unknown architecture, or one that cannot compute activations twice;
            a base that does not exist, or whose tensors do not fit the architecture.
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
        super().__init__(optimizer, scheduler, scheduler_interval, warmup_fraction, seed)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected a fraction in [0, 1], such as 0.1")
        if not 0.0 <= mixup < float("inf"):
            raise ValueError(f"mixup is {mixup}, expected an alpha of at least 0, such as 0.2, or 0 for none")
        self.pretrained, self.num_classes, self.label_smoothing = pretrained, num_classes, label_smoothing
        self.mixup = MixUp(alpha=mixup, num_classes=num_classes) if mixup else None
        self.save_hyperparameters("model_name", "num_classes", "pretrained", "model_kwargs", "keep_head", "seed")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # the new head is a function of the seed alone
            model, new = load_model(model_name, pretrained, num_classes, model_kwargs or {}, keep_head)
        self.set_model(model, new, layer_before_head(model), gradient_checkpointing)
        self.metrics = nn.ModuleDict({split: ClassificationScores(num_classes) for split in ("val", "test")})

    @property
    def data_config(self) -> dict[str, Any]:
        """How images are prepared, as :func:`dpp_lightning.tasks.vision.image_transforms.data_config` gives it."""
        return data_config(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (samples, classes) of images (samples, channels, height, width)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy, of mixed images where ``mixup`` is above 0."""
        images, labels = batch if self.mixup is None else self.mixup(*batch)
        loss = functional.cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Predicted class of every sample, (samples,), for images with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return cast(Tensor, self(images)).argmax(dim=-1)

    def score_batch(self, split: str, batch: Batch, dataloader_idx: int = 0) -> None:
        """Add the predictions for a batch to its scores."""
        images, labels = batch
        # the model is called with fillers too: where it is sharded, all ranks must call it
        self.scores(split, dataloader_idx).update(self(images), labels)
