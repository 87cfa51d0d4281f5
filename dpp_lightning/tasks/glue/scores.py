"""The scores of one GLUE task over a whole split and all ranks."""

from collections.abc import Callable, ItemsView
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL
from dpp_lightning.tasks.glue.task_table import GLUETask


class GLUEScores(nn.Module):
    """Loss and metrics of one split.

    Args:
        task: row of the task table.

    Attributes:
        metrics: name to torchmetrics metric.
    """

    def __init__(self, task: GLUETask) -> None:
        makers: dict[str, Callable[[], Metric]] = {
            "accuracy": lambda: MulticlassAccuracy(task.num_labels, average="micro"),
            "f1": BinaryF1Score,
            "matthews": lambda: Matthews(task.num_labels),
            "pearson": PearsonCorrCoef,
            "spearman": SpearmanCorrCoef,
        }
        loss = MeanMetric(
            nan_strategy=float("nan")
        )  # NaN stays NaN; so it does with "disable", which drops the weights
        super().__init__()
        self.definition = task
        self.metrics = nn.ModuleDict({"loss": loss, **{name: makers[name]() for name in task.metrics}})

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch; samples of label -100, which only give every rank equally many steps, are left out.

        Args:
            logits: (samples, labels).
            labels: (samples,), classes or similarities.
        """
        counted = labels != IGNORED_LABEL
        logits, labels = logits[counted].float(), labels[counted]
        if not len(labels):
            return
        for name, metric in self._items():
            if name == "loss":
                metric.update(glue_loss(self.definition, logits, labels), weight=len(labels))
            else:
                metric.update(glue_prediction(self.definition, logits), labels)

    def compute(self) -> dict[str, Tensor]:
        """``loss``, every metric, and ``score``, the mean of the metrics; at most 1, and 0 for equal predictions."""
        values: dict[str, Tensor] = {name: metric.compute() for name, metric in self._items()}
        for name in self.definition.metrics:
            if self.definition.num_labels == 1 and not values["loss"].isfinite():  # ranks of NaN are numbers
                values[name] = torch.zeros_like(values[name])
            values[name] = values[name].nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)  # 0/0 where predictions are equal
        values["score"] = torch.stack([values[name] for name in self.definition.metrics]).mean()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for _, metric in self._items():
            metric.reset()

    def _items(self) -> ItemsView[str, Metric]:
        return cast(ItemsView[str, Metric], self.metrics.items())


def glue_loss(task: GLUETask, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of a batch, or STS-B's mean squared error.

    Args:
        task: row of the task table.
        logits: (samples, labels).
        labels: (samples,), classes or similarities.
    """
    if task.num_labels == 1:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)


def glue_prediction(task: GLUETask, logits: Tensor) -> Tensor:
    """Predicted class, or STS-B's similarity, of every sample, (samples,), of logits (samples, labels)."""
    return logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(dim=-1)


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation; 0, as scikit-learn's, where all predictions or all labels are equal."""

    def compute(self) -> Tensor:
        """The correlation, in [-1, 1]."""
        confusion = self.confmat
        constant = min(int((confusion.sum(dim) > 0).sum()) for dim in (0, 1)) < 2
        return torch.zeros((), device=confusion.device) if constant else super().compute()
