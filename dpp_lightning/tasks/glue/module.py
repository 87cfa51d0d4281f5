"""Fine-tuning an encoder on GLUE as in DAREx, appendix C.2: learning rate 1e-4 with warm-up, batches of 16."""

from collections.abc import Mapping
from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dpp_lightning.optim import AdamR
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.tasks.common.lora import LoRA
from dpp_lightning.tasks.common.module import FineTuningModule
from dpp_lightning.tasks.common.optimization import Schedule
from dpp_lightning.tasks.common.pretrained import PRETRAINED, check_pretrained, loading
from dpp_lightning.tasks.glue.scores import GLUEScores, glue_loss, glue_prediction
from dpp_lightning.tasks.glue.task_table import glue_task


class GLUEModule(FineTuningModule):
    """A pre-trained encoder with a new classification or regression head, trained and scored on one GLUE task.

    Logs ``val_score`` (Matthews for CoLA, mean of accuracy and F1 for MRPC and QQP, mean of Pearson and Spearman for
    STS-B, else accuracy; at most 1), the single metrics (``val_accuracy``, ``val_f1``, ...) and ``val_loss``, over the
    whole split and all ranks; the same as ``test_...``, and as ``test_mismatched_...`` for MNLI's second test set.
    Predictions that are all equal have no correlation with anything: it counts as 0.

    Args:
        task: one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte.
        pretrained: hub id or local folder of the base.
        revision: branch, tag or commit on the hub.
        optimizer: makes the optimizer from the groups of ``dpp_lightning.tasks.common.optimization.parameter_groups``.
        scheduler: ``linear`` (warm-up, then down to 0), ``constant`` (neither), or what makes a scheduler.
        scheduler_interval: whether a scheduler that you name is stepped each ``step`` or each ``epoch``.
        warmup_fraction: fraction of all steps, in [0, 1], that ``linear`` warms up in.
        seed: seed of the new head, adapters and dropout; by default the one of ``seed_everything``, else 0.
        lora: train adapters and the new head, with the base frozen; by default everything is trained.
        gradient_checkpointing: compute activations twice to save memory.

    Attributes:
        new_parameter_names: parameters that no file of the base holds, e.g. ``model.classifier.weight``.
        output_layer: submodule whose output is the last hidden representation, e.g. ``model.bert.encoder.layer.11``.

    Raises:
        ValueError: an unknown task; a base that lacks more than whole submodules such as head and pooler, or that
            cannot compute activations twice; adapters for layers that the base does not have.
        FileNotFoundError: no such base.
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
        super().__init__(optimizer, scheduler, scheduler_interval, warmup_fraction, seed)
        self.definition = glue_task(task)
        self.task, self.pretrained, self.revision = task, pretrained, revision
        self.save_hyperparameters("task", "pretrained", "revision", "seed")
        self.lora = LoRA.from_setting(lora)
        self.hparams["lora"] = self.lora.plain() if self.lora else None  # a checkpoint holds plain values alone
        model, missing = _load(pretrained, revision, self.definition.num_labels, self.seed)
        new = {name for name, _ in model.named_parameters()} & missing
        self.set_model(model, new, _last_hidden_layer(model), gradient_checkpointing, self.lora)
        prefixes = [*self.prefixes("val"), *self.prefixes("test")]
        self.metrics = nn.ModuleDict({prefix: GLUEScores(self.definition) for prefix in prefixes})

    def prefixes(self, split: str) -> list[str]:
        """``val`` or ``test``; MNLI's second test set has ``test_mismatched``."""
        return ["test", "test_mismatched"][: len(self.definition.evaluation)] if split == "test" else [split]

    @property
    def max_length(self) -> int | None:
        """Most tokens that the model takes; ``None`` where its config does not say."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for name, module in self.model.named_modules():  # RoBERTa counts positions from the padding index on
            if limit and name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                return int(limit - module.padding_idx - 1)
        return limit if limit and limit > 0 else None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (samples, labels) of a batch of tokens; ``labels`` may be among its entries."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy, or STS-B's squared error."""
        loss = glue_loss(self.definition, self(batch), batch["labels"])
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def score_batch(self, split: str, batch: Mapping[str, Tensor], dataloader_idx: int = 0) -> None:
        """Add the predictions of a batch to its scores."""
        self.scores(split, dataloader_idx).update(self(batch), batch["labels"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Predicted class, or STS-B's similarity, of every sample: (samples,)."""
        return glue_prediction(self.definition, self(batch))


def _load(pretrained: str, revision: str | None, num_labels: int, seed: int) -> tuple[PreTrainedModel, set[str]]:
    """The model in float32 and training mode, and the names of its tensors that the files do not hold.

    Raises:
        ValueError: an incomplete base, or one that cannot be loaded.
        FileNotFoundError: no such base.
    """
    source = check_pretrained(pretrained, revision)
    with torch.random.fork_rng(devices=[]), loading(pretrained), without_load_report():
        torch.manual_seed(seed)  # the new head is a function of the seed alone
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            revision=revision or "main",
            num_labels=num_labels,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    missing = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    _check_complete(model, missing, pretrained)
    return model.train(), missing


def _check_complete(model: PreTrainedModel, missing: set[str], pretrained: str) -> None:
    """Refuse a base whose files lack single tensors, or a stack of blocks: only a whole pooler or the like may be new.

    Raises:
        ValueError: the first submodule that is incomplete, with its first missing tensor.
    """
    base = model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    for child, module in base.named_children():
        names = {f"{prefix}{child}.{name}" for name, _ in module.named_parameters()}
        absent = sorted(names & missing)
        is_stack = any(isinstance(submodule, nn.ModuleList) for submodule in module.modules())
        if absent and (len(absent) < len(names) or is_stack):
            raise ValueError(
                f"{PRETRAINED} {pretrained} lacks {len(absent)} of {len(names)} tensors of {prefix}{child} or has "
                f"them in other shapes, {absent[0]} the first; "
                f"expected a complete base of type {model.config.model_type}"
            )


def _last_hidden_layer(model: PreTrainedModel) -> str:
    """The first of several linear layers of the head (RoBERTa's ``classifier.dense``), else the last encoder block.

    The released codes take the same: BERT's last hidden state, and the output of the dense layer in RoBERTa's head.

    Raises:
        ValueError: the model has no stack of blocks.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    head = [n for n, m in modules.items() if isinstance(m, nn.Linear) and not n.startswith(prefix)]
    if model.base_model is not model and len(head) > 1:
        return head[0]
    stacks = [(name, len(m)) for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, length in sorted(stacks, key=lambda stack: (stack[1] != depth, -stack[1])):
        return f"{name}.{length - 1}"
    raise ValueError(f"found no stack of blocks in {type(model).__name__}; expected a transformer encoder")
