"""The eight GLUE tasks of the papers: one row each."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class GLUETask:
    """One task: text columns, the papers' metrics, number of classes (1: regression), labelled splits to test on."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    num_labels: int = 2
    evaluation: tuple[str, ...] = ("validation",)

    @property
    def label_range(self) -> tuple[int, int]:
        """Least and largest label; STS-B's similarities run from 0 to 5."""
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
    """The task of that name; a ``ValueError`` suggests the nearest for any other."""
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), TASKS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown GLUE task {name!r}; {hint}known are {', '.join(TASKS)}")
    return TASKS[name]
