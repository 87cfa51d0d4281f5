"""Loss and exact match of a decoder over a whole split and all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from dpp_lightning.tasks.causal_lm.math_answers import final_answer, same_answer
from dpp_lightning.tasks.common.reproducible import IGNORED_LABEL


class CausalScores(Metric):
    """Sums over a split, as a torchmetrics metric, so that ranks are added up."""

    full_state_update = False
    loss_sum: Tensor
    tokens: Tensor
    samples: Tensor
    correct: Tensor
    answered: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss_sum", "tokens", "samples", "correct", "answered"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: tuple[Tensor, Tensor], answers: Sequence[tuple[str | None, str]] = ()) -> None:
        """Count a batch.

        Args:
            losses: sum of the loss over the answers' tokens, and their number, as :func:`answer_loss` gives them.
            answers: for each sample the final answer that was generated, if any, and the reference's.
        """
        self.loss_sum += losses[0].double()
        self.tokens += losses[1].double()
        self.samples += len(answers)
        self.correct += sum(same_answer(answer, expected) for answer, expected in answers)
        self.answered += sum(answer is not None for answer, _ in answers)

    def compute(self) -> dict[str, Tensor]:
        """``loss`` per token; where texts were generated ``score`` (fraction of exact matches), its standard error
        ``score_stderr``, and ``answered`` (fraction with a final answer at all)."""
        values = {"loss": self.loss_sum / self.tokens.clamp(min=1)}
        if self.samples > 0:
            correct = self.correct / self.samples
            values["score"] = correct
            values["score_stderr"] = (correct * (1 - correct) / (self.samples - 1).clamp(min=1)).sqrt()
            values["answered"] = self.answered / self.samples
        return {name: value.float() for name, value in values.items()}


def final_answers(generated: Sequence[str], references: Sequence[str]) -> list[tuple[str | None, str]]:
    """Final answers of generated texts and of the references, which all have one."""
    pairs = zip(generated, references, strict=True)
    return [(final_answer(text), final_answer(reference) or "") for text, reference in pairs]


def answer_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropy over the tokens of the answers, and their number.

    Args:
        logits: (samples, tokens, vocabulary).
        labels: (samples, tokens); each is predicted by the logits of the token before it, -100 is ignored.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED_LABEL
    answer_logits = logits[:, :-1][
        counted
    ].float()  # the logits of other tokens stay in their own dtype, to save memory
    return functional.cross_entropy(answer_logits, targets[counted], reduction="sum"), counted.sum()
