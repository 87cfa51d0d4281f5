"""The eight GLUE tasks of the papers: one row each."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class GLUETask:
    """A row of the task table.

    Attributes:
        columns: the text columns.
        metrics: those of the papers, whose mean is the task's score.
        num_labels: number of classes; 1 for a regression.
        evaluation: the labelled splits that ``test`` reads.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    num_labels: int = 2
    evaluation: tuple[str, ...] = ("validation",)

    @property
    def label_range(self) -> tuple[int, int]:
        """Smallest and largest label; STS-B's similarities lie in [0, 5]."""
        return (0, 5) if self.num_labels == 1 else (0, self.num_labels - 1)


TASKS = {
    "cola": GLUETask(("sentence",), ("matthews",)),
    "sst2": GLUETask(("sentence",), ("accuracy",)),
    "mrpc": GLUETask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": GLUETask(("sentence1", "sentence2"), ("pearson", "spearman"), num_labels=1),
    "qqp": GLUETask(("question1", "question2"), ("accuracy", "f1")),
    "mnli": GLUETask(("premise", "hypothesis"), ("accuracy",), 3, ("validation_matched", "validation_mismatched")),
    "qnli": GLUETask(("question", "sentence"), ("accuracy",)),
    "rte": GLUETask(("sentence1", "sentence2"), ("accuracy",)),
}


def glue_task(name: str) -> GLUETask:
    """The row of a task.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown GLUE task {name!r}; {hint}known are {', '.join(TASKS)}")
    return TASKS[name]
