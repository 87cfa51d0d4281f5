"""What a delta is made of: kept entries, dense tensors, and the description that goes into ``delta_config.json``.

A merged delta carries what differs between its tasks, such as heads, once for each, under ``TASK/name``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpp_lightning.storage.model_folder import names_of_task
from dpp_lightning.tensors.factors import Factors

TASK_SEPARATOR = "/"  # between a task and the name of a tensor that is carried for it alone

Table = list[tuple[str, tuple[int, ...]]]  # canonical name and shape of every pruned tensor, in the file's order


@dataclass(frozen=True)
class SparseTensor:
    """One delta tensor: kept entries, and the product of two factors where the tensor has them.

    Attributes:
        shape: shape of the tensor, of its rows in common with the base where the vocabulary grew.
        indices: sorted distinct flat positions (C order), int32 or int64, shape (kept,).
        values: theta - theta_0 at these positions, or what the product leaves of it, not yet divided by q, of a float
            dtype, shape (kept,).
        factors: a product that is added as it is, never divided by q; None where the kept entries are all.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    factors: Factors | None = None

    @property
    def stored_numbers(self) -> int:
        """How many numbers it holds: kept values, and those of the factors."""
        return self.values.numel() + (self.factors.numbers if self.factors else 0)

    @property
    def num_changed(self) -> int:
        """How many entries applying overwrites."""
        return self.values.numel() if self.factors is None else prod(self.shape)

    @property
    def changed(self) -> Tensor:
        """The flat positions that applying overwrites, shape (changed,): the kept ones, or all beneath a product."""
        return self.indices if self.factors is None else torch.arange(prod(self.shape))

    @property
    def changes_something(self) -> bool:
        """Whether any kept value or product is other than 0."""
        of_product = self.factors is not None and bool(self.factors.left.any()) and bool(self.factors.right.any())
        return of_product or bool(self.values.any())

    def change(self, q: float) -> tuple[Tensor, float]:
        """What is added at :attr:`changed`, shape (changed,), and the number that it is to be divided by first."""
        if self.factors is None:
            return self.values, q
        product = self.factors.product().to(self.values.device)
        return product.index_add_(0, self.indices.long(), (self.values / q).to(product.dtype)), 1.0

    def dense(self, q: float) -> Tensor:
        """The tensor's whole delta, divided by q, float32 (float64 where the values are), of its shape."""
        if self.factors is None:
            wide = torch.promote_types(self.values.dtype, torch.float32)
            whole = torch.zeros(prod(self.shape), dtype=wide)
            return whole.index_copy_(0, self.indices.long(), self.values.to(wide) / q).view(self.shape)
        return self.change(q)[0].view(self.shape)


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says of itself besides its numbers: all of it is written to ``delta_config.json``.

    Attributes:
        method, pruning_rate, seed, q: as in the papers; a kept entry is applied as theta_0 + value / q.
        seeded: kept positions follow from seed and tensor names, so that no positions need storing.
        base_name, base_revision: hub id or folder of the base, if known.
        base_fingerprint: xxh3-128 over the base's tensors that the delta changes or relies on.
        base_check: xxh3-128 over the base's values at the positions that change, or samples of what is left alone where
            none changes, checked at every ``apply_``.
        base_first: the same over the first pruned tensor alone, so that streaming knows a wrong base at once.
        entries: number of entries of the whole fine-tuned model.
        dense_bytes: bytes of the whole fine-tuned model in its own dtype.
        dtype: how the file holds the kept values (integers are float32 in memory); None as they are.
        factors_dtype: the same of the numbers of factors; None for float32.
        drawn_rate: the rate at which a seeded selection drew each tensor, where that is not the pruning rate: a method
            that leaves tensors out keeps more of the others.
        rest: a seeded selection draws from tensors with factors too, what their product leaves.
        training: what was trained of the values, for the card; empty where nothing was.
        scope: the scope settings, as plain values.
        settings: the method's own settings.
        reverted: names of tensors that were left at the base's values.
        unchanged: names of tensors that training left alone.
        prefix, names: the fine-tuned model's own files call a tensor prefix + canonical name, unless ``names`` has it.
        absent_files: names of files beside the base's weights (configuration, tokenizer, modules) that the fine-tuned
            model does not have; empty where the delta was saved without such files, so that nothing is known of them.
    """

    method: str
    pruning_rate: float
    seed: int
    q: float
    seeded: bool
    base_name: str | None
    base_revision: str | None
    base_fingerprint: str
    base_check: str
    base_first: str
    entries: int
    dense_bytes: int
    dtype: str | None = None
    factors_dtype: str | None = None
    drawn_rate: float | None = None
    rest: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    scope: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reverted: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    prefix: str = ""
    names: dict[str, str] = field(default_factory=dict)
    absent_files: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks that a merged delta is for; empty for a delta of one model."""
        tasks = self.settings.get("tasks", [])
        return [str(task) for task in tasks] if isinstance(tasks, list) else []

    def saved_name(self, canonical: str) -> str:
        """What the fine-tuned model's own files call a tensor."""
        return self.names.get(canonical, self.prefix + canonical)

    def ratio(self, num_bytes: int) -> float:
        """How many times larger the dense fine-tuned model in its own dtype is than the delta.

        Args:
            num_bytes: bytes of the delta's model and config file.
        """
        return self.dense_bytes / max(num_bytes, 1)


@dataclass(frozen=True)
class DeltaContents:
    """A delta wherever it is: in memory, in a folder, or just being drawn or merged, one tensor after the other.

    Attributes:
        table: canonical name and shape of every pruned tensor, in order.
        tensors: starts to read canonical name and kept entries of one pruned tensor after the other.
        carried: canonical name to dense fine-tuned tensor, possibly mapped from a file.
        new_rows: canonical name to the rows that follow those in common with the base (a vocabulary that grew).
        info: gives the description. Of a delta that is being drawn or merged it is known only after the last tensor.
    """

    table: Table
    tensors: Callable[[], Iterator[tuple[str, SparseTensor]]]
    carried: Mapping[str, Tensor]
    new_rows: Mapping[str, Tensor]
    info: Callable[[], DeltaInfo]

    @property
    def shapes_in_base(self) -> dict[str, tuple[int, ...] | None]:
        """Names of what is not carried, and the base's shapes: those of pruned tensors, None for what is left alone."""
        info = self.info()
        return {**dict(self.table), **dict.fromkeys((*info.reverted, *info.unchanged))}

    @property
    def needs_task(self) -> bool:
        """Whether tensors are carried for single tasks, so that one task must be chosen before the delta is used."""
        starts = tuple(f"{task}{TASK_SEPARATOR}" for task in self.info().tasks)
        return any(name.startswith(starts) for name in self.carried)

    def for_task(self, task: str | None) -> DeltaContents:
        """The delta as one task uses it: described as that task's, with that task's carried tensors.

        Args:
            task: one of a merged delta's tasks; None where nothing differs between them, or for one that is no merge.

        Raises:
            ValueError: a task that is not in it, or none where one must be chosen.
        """
        info = self.info()
        tasks = info.tasks
        if task is None:
            if self.needs_task:
                raise ValueError(
                    f"this delta merges {', '.join(tasks)}, with a head for each: choose one "
                    f"(delta.for_task({tasks[0]!r}), --task {tasks[0]})"
                )
            return self
        if task not in tasks:
            known = f"it merges {', '.join(tasks)}" if tasks else "it is no merged delta, so leave the task out"
            raise ValueError(f"the delta has no task {task!r}: {known}")
        start, starts = f"{task}{TASK_SEPARATOR}", tuple(f"{name}{TASK_SEPARATOR}" for name in tasks)
        carried = {name: tensor for name, tensor in self.carried.items() if not name.startswith(starts)}
        carried |= {name[len(start) :]: t for name, t in self.carried.items() if name.startswith(start)}
        unchanged = tuple(name for name in info.unchanged if name not in carried)
        settings = {key: value for key, value in info.settings.items() if key != "tasks"} | {"task": task}
        absent = tuple(names_of_task(dict.fromkeys(info.absent_files), tasks, task))
        task_info = replace(info, unchanged=unchanged, settings=settings, absent_files=absent)
        return replace(self, carried=carried, info=lambda: task_info)


class AbsoluteEntries(NamedTuple):
    """New values of one tensor at some of its entries, as engines that hold the base take them.

    Attributes:
        name: the base's own name of the tensor.
        shape: shape of the whole tensor.
        dtype: dtype of the base's tensor and of the values.
        values: theta_0 + delta / q, shape (kept,), finite.
        indices: sorted distinct flat positions in C order, int64, shape (kept,).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor
