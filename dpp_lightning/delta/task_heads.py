"""What a merged delta keeps for each task: heads and other carried tensors, under the task's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dpp_lightning.delta.contents import DeltaContents, DeltaInfo

_SEPARATOR = "/"  # between a task and the name of its tensor
_TASK_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")  # Windows drops a dot at the end of a folder


def check_task_names(tasks: Sequence[str]) -> None:
    """Refuse names that cannot name files and tensors, or that come twice, where case does not count.

    Raises:
        ValueError: with the names and the cure.
    """
    unusable = [task for task in tasks if not _TASK_NAME.fullmatch(task)]
    if unusable or len({task.lower() for task in tasks}) != len(tasks):
        raise ValueError(
            f"the deltas are named {', '.join(map(repr, tasks))}: each needs a name of its own of letters, digits, "
            "'_', '-' and '.'; give them in the deltas' order (tasks=, --tasks sst2 cola)"
        )


def task_names(info: DeltaInfo) -> list[str]:
    """The tasks that a delta merges; empty for a delta of one model."""
    tasks = info.settings.get("tasks", [])
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def merge_carried(carried: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Carried tensors of several tasks as one mapping: those that all tasks have alike once, the others under their
    task's name.

    Args:
        carried: task to (canonical name to tensor).
    """
    merged: dict[str, Tensor] = {}
    first, *others = carried.values()
    for name in sorted({name for task_carried in carried.values() for name in task_carried}):
        if name in first and all(name in other and _equal(first[name], other[name]) for other in others):
            merged[name] = first[name]
        else:
            merged |= {
                f"{task}{_SEPARATOR}{name}": tensors[name] for task, tensors in carried.items() if name in tensors
            }
    return merged


def needs_task(contents: DeltaContents) -> bool:
    """Whether a delta carries tensors for single tasks, so that one task must be chosen before it is used."""
    tasks = task_names(contents.info())
    return any(name.startswith(f"{task}{_SEPARATOR}") for task in tasks for name in contents.carried)


def of_task(contents: DeltaContents, task: str | None) -> DeltaContents:
    """A delta as one task uses it: described as that task's, with that task's carried tensors.

    Args:
        contents: of a merged delta, or of one that is no merge.
        task: one of its tasks; None where nothing differs between them.

    Raises:
        ValueError: a task that is not in it, or none where one must be chosen.
    """
    info = contents.info()
    tasks = task_names(info)
    if task is None:
        if needs_task(contents):
            raise ValueError(
                f"this delta merges {', '.join(tasks)}, with a head for each: choose one "
                f"(delta.for_task({tasks[0]!r}), --task {tasks[0]})"
            )
        return contents
    if task not in tasks:
        known = f"it merges {', '.join(tasks)}" if tasks else "it is no merged delta, so leave the task out"
        raise ValueError(f"the delta has no task {task!r}: {known}")
    start, starts = f"{task}{_SEPARATOR}", tuple(f"{name}{_SEPARATOR}" for name in tasks)
    carried = {name: tensor for name, tensor in contents.carried.items() if not name.startswith(starts)}
    carried |= {name[len(start) :]: t for name, t in contents.carried.items() if name.startswith(start)}
    unchanged = tuple(name for name in info.unchanged if name not in carried)
    settings = {key: value for key, value in info.settings.items() if key != "tasks"} | {"task": task}
    task_info = replace(info, unchanged=unchanged, settings=settings)
    return replace(contents, carried=carried, info=lambda: task_info)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
