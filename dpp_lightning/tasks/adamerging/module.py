"""AdaMerging: the weights of a merge, trained by the entropy of the merged model's predictions on unlabelled batches.

Paper: AdaMerging: Adaptive Model Merging for Multi-Task Learning, https://arxiv.org/abs/2310.02575.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dpp_lightning.delta.folder import DeltaReader
from dpp_lightning.merging.merge_deltas import merge_checkpoints
from dpp_lightning.merging.sources import MergeSource
from dpp_lightning.merging.trained_weights import MergedTensors
from dpp_lightning.storage.atomic_write import atomic_file, check_writable
from dpp_lightning.storage.locate import local_path
from dpp_lightning.storage.output_folder import DELTA, check_output
from dpp_lightning.storage.quiet_loading import without_load_report
from dpp_lightning.storage.source_kind import check_delta
from dpp_lightning.tasks.common.module import ScoredModule
from dpp_lightning.tasks.common.pretrained import check_pretrained, loading
from dpp_lightning.tasks.glue.scores import GLUEScores
from dpp_lightning.tasks.glue.task_table import TASKS
from dpp_lightning.tensors.name_matching import match_names
from dpp_lightning.tensors.names import source_names

COEFFICIENTS_FILE, DELTA_FOLDER = "coefficients.json", "delta"


class AdaMergingModule(ScoredModule):
    """A base plus sum_k lambda_k delta_k, where only the coefficients lambda are trained.

    The loss is the mean entropy of the predictions, summed over tasks; for causal language models that of the next
    token. Training batches are task to a batch of tokens. At the end of fit ``output_dir`` gets ``coefficients.json``
    (for ``dpp merge --method adamerging --weights``) and the merged delta folder ``delta``. For GLUE tasks it logs
    ``val_{task}_score`` and ``test_{task}_score``, and the mean over tasks as ``val_score`` and ``test_score``.

    The predictions of a regression task (STS-B) have no entropy: its coefficients stay at ``start``.

    Args:
        deltas: task to delta folder or hub id, all of one base; each task keeps its head and other carried tensors.
        pretrained: hub id or local folder of the base.
        revision: branch, tag or commit on the hub.
        granularity: one coefficient for each ``task``, or for each ``layer`` (weight tensor) and task.
        start: initial value of the coefficients.
        optimizer: makes the optimizer of the coefficients; by default Adam with learning rate 1e-3.
        architecture: ``classification`` or ``causal-lm``.
        output_dir: by default ``merged`` in the trainer's log folder.

    Raises:
        ValueError: no delta of a task with classes, a start that is no number; when the model is made: deltas of
            another base, a delta without the head that the base lacks, vocabularies that grew.
        FileNotFoundError: when the model is made: a delta or base that does not exist.
    """

    def __init__(
        self,
        deltas: dict[str, str],
        pretrained: str = "google-bert/bert-base-uncased",
        revision: str | None = None,
        granularity: Literal["task", "layer"] = "layer",
        start: float = 0.3,
        optimizer: OptimizerCallable = torch.optim.Adam,
        architecture: Literal["classification", "causal-lm"] = "classification",
        output_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.tasks = list(deltas)
        self._fixed = [k for k, task in enumerate(self.tasks) if _is_regression(task)]
        if len(self._fixed) == len(self.tasks):
            raise ValueError(f"AdaMerging needs the deltas of tasks with classes, got {self.tasks or 'none'}")
        self.deltas, self.pretrained, self.revision = deltas, pretrained, revision
        self.granularity, self.start, self.architecture = granularity, float(start), architecture
        self.optimizer, self.output_dir = optimizer, output_dir
        self.automatic_optimization = self.strict_loading = False
        self.model: PreTrainedModel | None = None
        self._heads: dict[str, dict[str, Tensor]] = {}
        scored = [(f"{split}_{task}", TASKS[task]) for split in ("val", "test") for task in self.tasks if task in TASKS]
        self.metrics = nn.ModuleDict({prefix: GLUEScores(task) for prefix, task in scored})

    def configure_model(self) -> None:
        """Load the base and the deltas."""
        if self.model is not None:
            return
        for task, folder in self.deltas.items():
            check_delta(folder, f"model.deltas.{task}")
        readers = [DeltaReader.open(folder) for folder in self.deltas.values()]
        sources = MergeSource.all(readers, self.tasks)
        model, missing = self._load()
        model_names = source_names(model)
        for source in sources:
            carried, new_rows = source.contents.carried, source.contents.new_rows
            if new_rows:
                raise ValueError(f"{source.task} grew {sorted(new_rows)}: prune it again with that carried")
            names = match_names(carried, model_names)
            head = {model_names[names[n]]: tensor.clone() for n, tensor in carried.items() if n in names}
            self._heads[source.task] = head
            if lacking := sorted(missing - set(head)):
                raise ValueError(f"neither the base nor the delta of {source.task} holds {', '.join(lacking)}")
        self.model = model
        self.blends = MergedTensors(model, sources)
        rows = len(self.blends.names) if self.granularity == "layer" else 1
        self.coefficients = nn.Parameter(torch.full((rows, len(self.tasks)), self.start))
        if self._fixed:
            fixed = ", ".join(self.tasks[k] for k in self._fixed)
            rank_zero_warn(f"{fixed} has no entropy: its coefficients stay at {self.start:g}")

    def _load(self) -> tuple[PreTrainedModel, set[str]]:
        """The base, frozen, and the names of its parameters that no file holds."""
        cls: Any = AutoModelForSequenceClassification if self.architecture == "classification" else AutoModelForCausalLM
        settings = {"revision": self.revision or "main", "dtype": torch.float32, "output_loading_info": True}
        source = check_pretrained(self.pretrained, self.revision)
        with loading(self.pretrained), without_load_report():
            model, info = cls.from_pretrained(source, **settings)
        return model.requires_grad_(False).eval(), set(info["missing_keys"])

    def train(self, mode: bool = True) -> "AdaMergingModule":
        """Set the mode of the module, but never that of the model: its predictions are adapted without dropout."""
        super().train(mode)
        if self.model is not None:
            self.model.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], task: str) -> Tensor:
        """Logits (samples, classes) of a batch, by the merged weights as they were last written and a task's head."""
        return self._call(batch, self._head(task))

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> None:
        """A step of the coefficients. Backward runs task by task, so that one tensor's gradient is held at a time."""
        optimizer = cast(Any, self.optimizers())
        optimizer.zero_grad()
        self.blends.write(self.coefficients)
        total = torch.zeros((), device=self.device)
        for task, tokens in batch.items():
            if _is_regression(task):
                continue
            logits = self._call(tokens, {**self.blends.tensors(self.coefficients), **self._head(task)})
            mask = tokens["attention_mask"] if self.architecture == "causal-lm" else None
            loss = prediction_entropy(logits, mask)
            self.manual_backward(loss)
            total += loss.detach()
        assert self.coefficients.grad is not None
        self.coefficients.grad[:, self._fixed] = 0.0
        optimizer.step()
        self.log("train_entropy", total, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the coefficients."""
        return self.optimizer([self.coefficients])

    # ------------------------------------------------------------------ scores

    def prefixes(self, split: str) -> list[str]:
        """One loader for each task, in the order of the tasks."""
        return [f"{split}_{task}" for task in self.tasks]

    def start_scoring(self, split: str) -> None:
        """Merge by the coefficients as they are, and forget the batches of earlier passes."""
        self.blends.write(self.coefficients)
        super().start_scoring(split)

    def score_batch(self, split: str, batch: Mapping[str, Tensor], dataloader_idx: int = 0) -> None:
        """Add a batch of one task to its scores; tasks outside GLUE have none."""
        scores = self.scores(split, dataloader_idx)
        if scores is not None:
            scores.update(self(batch, self.tasks[dataloader_idx]), batch["labels"])

    def log_scores(self, split: str) -> None:
        """Log every task's score and their mean."""
        scores = {prefix: self.scores(split, index) for index, prefix in enumerate(self.prefixes(split))}
        values = {prefix: s.compute()["score"] for prefix, s in scores.items() if s is not None}
        for prefix, value in values.items():
            self.log(f"{prefix}_score", value, sync_dist=True)
        if values:
            self.log(f"{split}_score", torch.stack(list(values.values())).mean(), prog_bar=True, sync_dist=True)

    # ------------------------------------------------------------------ the result

    def on_fit_start(self) -> None:
        """Check now, not after hours, that the output folder can be written."""
        folder = self._folder()
        if self.trainer.is_global_zero:
            check_writable(folder)
            deltas = [(f"model.deltas.{task}", delta) for task, delta in self.deltas.items()]
            inputs = [("model.pretrained", self.pretrained), *deltas]
            check_output(folder / DELTA_FOLDER, DELTA, overwrite=True, inputs=inputs)

    def on_train_end(self) -> None:
        """Write the coefficients and the merged delta."""
        folder, weights = self._folder(), self.coefficients_by_task()
        if not self.trainer.is_global_zero:
            return
        with atomic_file(folder / COEFFICIENTS_FILE) as path:
            path.write_text(json.dumps(weights, indent=1) + "\n", encoding="utf-8")
        deltas = list(self.deltas.values())
        settings: dict[str, Any] = {"tasks": self.tasks, "base_revision": self.revision, "overwrite": True}
        merge_checkpoints(self.pretrained, deltas, folder / DELTA_FOLDER, "adamerging", weights, **settings)
        rank_zero_info(f"coefficients and merged delta are in {folder}")

    def coefficients_by_task(self) -> dict[str, dict[str, float]]:
        """For each task the coefficient of every tensor by canonical name, or one under ``*``."""
        names = self.blends.names if self.granularity == "layer" else ["*"]
        columns = self.coefficients.detach().t().tolist()
        return {task: dict(zip(names, column, strict=True)) for task, column in zip(self.tasks, columns, strict=True)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the coefficients alone: all else is in the base and the deltas."""
        checkpoint["state_dict"] = {"coefficients": checkpoint["state_dict"]["coefficients"]}

    def _folder(self) -> Path:
        """All ranks must call: the log folder is broadcast."""
        return local_path(self.output_dir or Path(self.trainer.log_dir or self.trainer.default_root_dir) / "merged")

    def _head(self, task: str) -> dict[str, Tensor]:
        self._heads[task] = {name: tensor.to(self.device) for name, tensor in self._heads[task].items()}
        return self._heads[task]

    def _call(self, batch: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> Tensor:
        assert self.model is not None
        tokens = {name: value for name, value in batch.items() if name != "labels"}
        return functional_call(self.model, tensors, args=(), kwargs=tokens).logits


def _is_regression(task: str) -> bool:
    return task in TASKS and TASKS[task].num_labels == 1


def prediction_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of predictions, -sum_c p_c log p_c with p the softmax of the logits, in nats.

    Args:
        logits: (samples, classes); of a causal language model (samples, tokens, vocabulary).
        mask: for a causal language model, (samples, tokens), 1 at tokens and 0 at padding. A prediction counts where
            the next token is no padding.

    Returns:
        A differentiable scalar; 0 where no prediction counts.
    """
    logs = logits.float().log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    if mask is None:
        return entropy.mean()
    counts = mask[:, 1:].to(entropy.dtype)
    return (entropy[:, :-1] * counts).sum() / counts.sum().clamp(min=1)
