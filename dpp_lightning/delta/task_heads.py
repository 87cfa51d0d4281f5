"""What a merged delta keeps for each task: heads and other carried tensors, under the task's name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dpp_lightning.delta.contents import DeltaInfo

_MARK = "/"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse names that cannot name files and tensors, or that come twice.

    Raises:
        ValueError: with the names and the cure.
    """
    wrong = [task for task in tasks if not _NAME.fullmatch(task)]
    if wrong or len(set(tasks)) != len(tasks):
        raise ValueError(
            f"the deltas are named {', '.join(map(repr, tasks))}: each needs a name of its own of letters, digits, "
            "'_', '-' and '.'; give them in the deltas' order (tasks=, --tasks sst2 cola)"
        )


def task_names(info: DeltaInfo) -> list[str]:
    """The tasks that a delta merges; empty for a delta of one model."""
    tasks = info.settings.get("tasks", [])
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def for_tasks(carried: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Carried tensors of several tasks as one mapping: what all have alike once, the others under their task's name.

    Args:
        carried: task to (canonical name to tensor).
    """
    merged: dict[str, Tensor] = {}
    first, *others = carried.values()
    for name in sorted({name for own in carried.values() for name in own}):
        if name in first and all(name in own and _equal(first[name], own[name]) for own in others):
            merged[name] = first[name]
            continue
        merged |= {f"{task}{_MARK}{name}": own[name] for task, own in carried.items() if name in own}
    return merged


def need_choice(tasks: Sequence[str], carried: Iterable[str]) -> bool:
    """Whether something is carried for single tasks, so that one must be chosen before a merged delta is used."""
    return any(name.startswith(f"{task}{_MARK}") for task in tasks for name in carried)


def of_task(info: DeltaInfo, carried: Mapping[str, Tensor], task: str | None) -> tuple[DeltaInfo, dict[str, Tensor]]:
    """Description and carried tensors of a merged delta as one task uses it.

    Args:
        info, carried: of the merged delta, or of one that is no merge.
        task: one of its tasks; None where nothing differs between them.

    Raises:
        ValueError: a task that is not in it, or none where one must be chosen.
    """
    tasks = task_names(info)
    if task is None:
        if need_choice(tasks, carried):
            raise ValueError(
                f"this delta merges {', '.join(tasks)}, with a head for each: choose one "
                f"(delta.for_task({tasks[0]!r}), --task {tasks[0]})"
            )
        return info, dict(carried)
    if task not in tasks:
        known = f"it merges {', '.join(tasks)}" if tasks else "it is no merged delta, so leave the task out"
        raise ValueError(f"the delta has no task {task!r}: {known}")
    own = _strip_task(carried, task, tasks)
    unchanged = tuple(name for name in info.unchanged if name not in own)
    settings = {key: value for key, value in info.settings.items() if key != "tasks"} | {"task": task}
    return replace(info, unchanged=unchanged, settings=settings), own


def _strip_task(carried: Mapping[str, Tensor], task: str, tasks: Sequence[str]) -> dict[str, Tensor]:
    """What is under no task's name, and what is under this task's, without that name."""
    shared = {n: tensor for n, tensor in carried.items() if not any(n.startswith(f"{t}{_MARK}") for t in tasks)}
    start = f"{task}{_MARK}"
    return shared | {name[len(start) :]: tensor for name, tensor in carried.items() if name.startswith(start)}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
