"""The scores of one GLUE task over a whole split and all ranks."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL
from dpp_lightning.tasks.glue.task_table import GLUETask


class GLUEScores(nn.ModuleDict):
    """Loss and metrics of one split: by name, the torchmetrics they are made of.

    Args:
        task: the task's definition.
    """

    def __init__(self, task: GLUETask) -> None:
        makers: dict[str, Callable[[], Metric]] = {
            "accuracy": lambda: MulticlassAccuracy(task.num_labels, average="micro"),
            "f1": BinaryF1Score,
            "matthews": lambda: Matthews(task.num_labels),
            "pearson": PearsonCorrCoef,
            "spearman": SpearmanCorrCoef,
        }
        loss = MeanMetric(nan_strategy=float("nan"))  # a NaN stays NaN; "disable" also would, but drops the weights
        super().__init__({"loss": loss, **{name: makers[name]() for name in task.metrics}})
        self.definition = task

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (samples, labels) and labels (samples,); fillers take no part."""
        real = labels != IGNORED_LABEL  # fillers give every rank equally many steps
        logits, labels = logits[real].float(), labels[real]
        if not len(labels):
            return
        for name, metric in self._metrics().items():
            if name == "loss":
                metric.update(glue_loss(self.definition, logits, labels), weight=len(labels))
            else:
                metric.update(glue_prediction(self.definition, logits), labels)

    def scores(self) -> dict[str, Tensor]:
        """``loss``, every metric, and ``score``, their mean; predictions that are all alike count as 0."""
        values: dict[str, Tensor] = {name: metric.compute() for name, metric in self._metrics().items()}
        for name in self.definition.metrics:
            if self.definition.num_labels == 1 and not values["loss"].isfinite():  # ranks of NaN are numbers
                values[name] = torch.zeros_like(values[name])
            values[name] = values[name].nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0)  # constant predictions: 0/0
        values["score"] = torch.stack([values[name] for name in self.definition.metrics]).mean()
        return values

    def reset(self) -> None:
        """Forget all batches."""
        for metric in self._metrics().values():
            metric.reset()

    def _metrics(self) -> dict[str, Any]:
        return cast(dict[str, Any], dict(self.items()))


def glue_loss(task: GLUETask, logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, or STS-B's squared error."""
    if task.num_labels == 1:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)


def glue_prediction(task: GLUETask, logits: Tensor) -> Tensor:
    """Predicted class, or STS-B's similarity, of every sample: (samples,)."""
    return logits.squeeze(-1) if task.num_labels == 1 else logits.argmax(dim=-1)


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation that is 0, as scikit-learn's, where all predictions or all labels are alike."""

    def compute(self) -> Tensor:
        confusion = self.confmat
        alike = min(int((confusion.sum(dim) > 0).sum()) for dim in (0, 1)) < 2
        return torch.zeros((), device=confusion.device) if alike else super().compute()
