"""Fine-tuning an encoder on GLUE as in DAREx, appendix C.2: learning rate 1e-4 with warm-up, batches of 16."""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dpp_lightning.optim import AdamR
from dpp_lightning.tasks.common.activation_checkpointing import checkpoint_activations
from dpp_lightning.tasks.common.lora import LoRA, with_adapters
from dpp_lightning.tasks.common.optimization import Schedule, parameter_groups, with_schedule
from dpp_lightning.tasks.common.reproducible import ReproducibleModule, resolve_seed
from dpp_lightning.tasks.common.sharding import shard_for_strategy
from dpp_lightning.tasks.glue.data import GLUEDataModule
from dpp_lightning.tasks.glue.scores import GLUEScores, glue_loss, glue_prediction
from dpp_lightning.tasks.glue.task_table import glue_task

__all__ = ["GLUEDataModule", "GLUEModule"]


class GLUEModule(ReproducibleModule):
    """A pre-trained encoder with a new classification or regression head, trained and scored on one GLUE task.

    Logs ``val_score`` (Matthews for CoLA, mean of accuracy and F1 for MRPC and QQP, mean of Pearson and Spearman for
    STS-B, else accuracy; at most 1), the single metrics (``val_accuracy``, ``val_f1``, ...) and ``val_loss``, over the
    whole split and all ranks; the same as ``test_...``, and as ``test_mismatched_...`` for MNLI's second test set.
    Predictions that are all alike have no correlation with anything: it counts as 0.

    Args:
        task: one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte.
        pretrained: hub id or local folder of the base.
        revision: branch, tag or commit on the hub.
        optimizer: makes the optimizer from the groups of ``dpp_lightning.tasks.common.optimization.parameter_groups``.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler of your own is stepped each ``step`` or each ``epoch``.
        warmup_fraction: share of all steps, in [0, 1], of the warm-up of ``linear``.
        seed: of the new head, of adapters and of dropout; by default the one of ``seed_everything``, else 0.
        lora: train adapters and the new head, with the base frozen; by default everything is trained.
        gradient_checkpointing: compute activations twice to save memory.

    Attributes:
        new_parameter_names: parameters that no file of the base holds, e.g. ``model.classifier.weight``.
        output_layer: submodule whose output is the last hidden representation, e.g. ``model.bert.encoder.layer.11``.

    Raises:
        ValueError: an unknown task, a base that lacks more than whole parts such as head and pooler or cannot compute
            activations twice, or adapters for layers that it has not.
    """

    def __init__(
        self,
        task: str,
        pretrained: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        optimizer: OptimizerCallable = AdamR,
        scheduler: Schedule = "linear",
        scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_fraction: float = 0.06,
        seed: int | None = None,
        lora: LoRA | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.definition = glue_task(task)
        self.task, self.pretrained, self.revision, self.seed = task, pretrained, revision, resolve_seed(seed)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.scheduler_interval, self.warmup_fraction = scheduler_interval, warmup_fraction
        self.save_hyperparameters("task", "pretrained", "revision", "seed")
        self.lora = LoRA.of(lora)
        self.hparams["lora"] = self.lora.plain() if self.lora else None  # a checkpoint holds plain values alone
        model, missing = _load(pretrained, revision, self.definition.num_labels, self.seed)
        if gradient_checkpointing:
            checkpoint_activations(model)
        new = {name for name, _ in model.named_parameters()} & missing
        layer = _last_hidden_layer(model)
        if self.lora is None:
            self.model: nn.Module = model
        else:
            self.model, new, layer = with_adapters(model, self.lora, new, layer, self.seed)
        self.new_parameter_names = tuple(sorted(f"model.{name}" for name in new))
        self.output_layer = f"model.{layer}"
        self.metrics = nn.ModuleDict({name: GLUEScores(self.definition) for name in ("val", "test", "test_mismatched")})

    @property
    def max_length(self) -> int | None:
        """Most tokens the model takes, ``None`` where its config does not say."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():  # RoBERTa's positions are counted from behind the padding index
            if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(limit - module.padding_idx - 1)
        return limit if limit and limit > 0 else None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (samples, labels) of a batch of tokens; ``labels`` may be among its entries."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def configure_model(self) -> None:
        """Share the model out where the strategy is ``ModelParallelStrategy``."""
        shard_for_strategy(self, self.model)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, or STS-B's squared error."""
        loss = glue_loss(self.definition, self(batch), batch["labels"])
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the scores of the validation split."""
        self._update("val", batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the scores of its test split."""
        self._update("test_mismatched" if dataloader_idx else "test", batch)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Predicted class, or STS-B's similarity, of every sample: (samples,)."""
        return glue_prediction(self.definition, self(batch))

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted pass has left."""
        self._reset()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted pass has left."""
        self._reset()

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of every test split."""
        self._log_scores("test")
        if len(self.definition.evaluation) > 1:
            self._log_scores("test_mismatched")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over two groups, pre-trained parameters and new heads, and its schedule."""
        optimizer = self.optimizer(parameter_groups(self, self.new_parameter_names))
        return with_schedule(optimizer, self.scheduler, self.scheduler_interval, self.trainer, self.warmup_fraction)

    def _update(self, split: str, batch: Mapping[str, Tensor]) -> None:
        self._scores(split).add(self(batch), batch["labels"])

    def _log_scores(self, prefix: str) -> None:
        for name, value in self._scores(prefix).scores().items():
            self.log(f"{prefix}_{name}", value, prog_bar=name == "score", sync_dist=True)

    def _scores(self, split: str) -> GLUEScores:
        return cast(GLUEScores, self.metrics[split])

    def _reset(self) -> None:
        for split in self.metrics:
            self._scores(split).reset()


def _load(pretrained: str, revision: str | None, num_labels: int, seed: int) -> tuple[PreTrainedModel, set[str]]:
    """The model in float32 and training mode, and the names of its tensors that the files do not hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the new head is a function of the seed alone
        model, info = AutoModelForSequenceClassification.from_pretrained(
            pretrained,
            revision=revision or "main",
            num_labels=num_labels,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for part, module in base.named_children():
        names = {f"{prefix}{part}.{name}" for name, _ in module.named_parameters()}
        if absent := sorted(names & missing):
            whole = len(absent) == len(names) and not any(isinstance(m, nn.ModuleList) for m in module.modules())
            if not whole:
                raise ValueError(
                    f"{pretrained} lacks {len(absent)} of {len(names)} tensors of {prefix}{part} or has them in other "
                    f"shapes, {absent[0]} the first; expected a complete base of type {model.config.model_type}"
                )
    return model.train(), missing


def _last_hidden_layer(model: PreTrainedModel) -> str:
    """The first of several linear layers of the head (RoBERTa's ``classifier.dense``), else the last encoder block.

    So do the released codes: BERT's last hidden state, RoBERTa's output of the head's dense layer.
    """
    prefix = f"{model.base_model_prefix}."
    head = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]
    if model.base_model is not model and len(head) > 1:
        return head[0]
    stacks = [(name, len(m)) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, length in sorted(stacks, key=lambda stack: (stack[1] != depth, -stack[1])):
        return f"{name}.{length - 1}"
    raise ValueError(f"found no stack of blocks in {type(model).__name__}; expected a transformer encoder")
