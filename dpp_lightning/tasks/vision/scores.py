"""Accuracy and loss of an image classifier over a whole split and all ranks."""

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL


class ClassificationScores(nn.Module):
    """Accuracy, which is the score, and mean cross entropy of one split.

    Args:
        num_classes: number of the model's outputs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.loss = MeanMetric(nan_strategy="disable")  # a NaN is counted, so that it is seen

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch; samples of label -100, which only give every rank equally many steps, are left out.

        Args:
            logits: (samples, classes).
            labels: integers (samples,).
        """
        counted = labels != IGNORED_LABEL
        logits, labels = logits[counted].float(), labels[counted]
        if len(labels):
            self.accuracy.update(logits, labels)
            self.loss.update(functional.cross_entropy(logits, labels, reduction="none"))

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` in [0, 1], ``loss``, and ``score``, which is the accuracy."""
        accuracy: Tensor = self.accuracy.compute()
        return {"accuracy": accuracy, "loss": self.loss.compute(), "score": accuracy}

    def reset(self) -> None:
        """Forget all batches."""
        self.accuracy.reset()
        self.loss.reset()
