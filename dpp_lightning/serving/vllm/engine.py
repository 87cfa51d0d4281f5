"""The weight-transfer backend ``dpp`` of vLLM: each worker reads the delta's folder itself, a path goes over the wire.

An update replaces whatever delta the server holds. It has two halves, and in each all workers wait for one another: the
delta is read and checked against the base's files, and vLLM's own loader is asked where each tensor goes; then the
values are overwritten in place. So what can fail for the delta's sake fails before anything is written, on all workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from vllm.distributed.parallel_state import get_inner_dp_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from dpp_lightning.serving.base_checkpoint import BaseCheckpoint, Changes
from dpp_lightning.serving.vllm.loader_check import check_engine, check_loader
from dpp_lightning.serving.vllm.switch import RESTART

_BYTES = 1 << 29  # of whole tensors that are patched by one call

Result = TypeVar("Result")


@dataclass
class DppInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed upon beforehand: ``{"init_info": {}}`` only checks that deltas can be used."""


@dataclass
class DppUpdateInfo(WeightTransferUpdateInfo):
    """What the server is to hold: ``{"update_info": {"delta": …}}``.

    Attributes:
        delta: folder as the workers see it, or hub id; None for the base.
        task: of a merged delta with a head for each task, the one that is wanted.
        revision: branch, tag or commit of a hub id.
        force: use the delta although it is of another base.
    """

    delta: str | None
    task: str | None = None
    revision: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("delta", "task", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"update_info: {name} must be a text or null, got {getattr(self, name)!r}")
        if not isinstance(self.force, bool):
            raise ValueError(f"update_info: force must be true or false, got {self.force!r}")


class DppEngine(WeightTransferEngine[DppInitInfo, DppUpdateInfo]):
    """Holds which delta one worker's weights have, and switches them; made by vLLM, arguments as there."""

    init_info_cls, update_info_cls = DppInitInfo, DppUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._base: BaseCheckpoint | None = None
        self._present: Changes = {}
        self._loadable: set[str] = set()  # names that the model's loader was seen to copy in place
        self._lost = ""  # why the weights are neither the base nor a known delta

    def init_transfer_engine(self, init_info: DppInitInfo) -> None:
        """Map the base's files and check that this server's weights can be overwritten in place.

        Raises:
            ValueError: they cannot, for the reason that is named.
        """
        self._together(self._open)

    def start_weight_update(self) -> None:
        """Nothing to prepare: values are overwritten in place."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Let go of the base's files; they are mapped again when needed. The weights stay as they are."""
        self._base = None

    def receive_weights(self, update_info: DppUpdateInfo) -> None:
        """Switch to a delta or the base.

        Raises:
            ValueError: nothing was written, or the weights are again as before.
            RuntimeError: neither, so that the server must be restarted.
        """
        if self._lost:
            raise RuntimeError(f"the weights are in no known state since {self._lost}; {RESTART}")
        base = self._together(self._open)
        wanted = self._together(lambda: self._read(base, update_info))
        present, self._lost = self._present, "an update was interrupted"
        try:
            self._together(lambda: self._write(base, present, wanted))
            self._present = wanted
        except ValueError as error:
            self._restore(base, present, wanted, error)
        self._lost = ""

    def _restore(self, base: BaseCheckpoint, present: Changes, wanted: Changes, error: ValueError) -> None:
        """Take a write that failed back, and say so."""
        try:
            self._together(lambda: self._write(base, wanted, present))
        except ValueError as second:
            self._lost = f"an update failed ({error}) and could not be taken back"
            raise RuntimeError(f"{error}; the weights before could not be restored ({second}): {RESTART}") from error
        self._lost = ""
        raise ValueError(f"{error}; the weights are as before") from error

    def _open(self) -> BaseCheckpoint:
        if self._base is None:
            check_engine(self.vllm_config, self.model)
            self._base = BaseCheckpoint(self.model_config.model, self.model_config.revision)
        return self._base

    def _read(self, base: BaseCheckpoint, info: DppUpdateInfo) -> Changes:
        if info.delta is None:
            return {}
        changes = base.changes(info.delta, revision=info.revision, task=info.task, force=info.force)
        new = {name: base.tensors[name] for name in changes if name not in self._loadable}
        check_loader(self.model, new, all_layers=self.parallel_config.pipeline_parallel_size == 1)
        self._loadable.update(new)
        return changes

    def _write(self, base: BaseCheckpoint, present: Changes, wanted: Changes) -> None:
        patches, size = [], 0
        for name, shape, dtype, values, indices in base.entries(present, wanted):
            values, indices = values.to(self.device), indices.to(self.device)
            patches.append(CheckpointWeightPatch(name, shape, dtype, values, indices))
            size += torch.Size(shape).numel() * dtype.itemsize
            if size >= _BYTES:
                self._load(patches)
                patches, size = [], 0
        self._load(patches)

    def _load(self, patches: list[CheckpointWeightPatch]) -> None:
        load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)

    def _together(self, work: Callable[[], Result]) -> Result:
        """The work's result, once all workers of this server's replica have done it; a ValueError with the first
        failure's message on all of them if one has failed."""
        cause: Exception | None = None
        try:
            result = work()
        except Exception as error:
            cause = error
        failure = next(filter(None, self._exchange(_line(cause))), "")
        if failure:
            raise ValueError(failure) from cause
        return result

    def _exchange(self, text: str) -> list[str]:
        """A text of every worker, in their order."""
        if self.parallel_config.world_size == 1:
            return [text]
        group = get_inner_dp_world_group()
        texts: list[str] = [""] * group.world_size
        torch.distributed.all_gather_object(texts, text, group=group.cpu_group)
        return texts


def _line(error: Exception | None) -> str:
    """An error in one line; empty for none."""
    return "" if error is None else " ".join(str(error).split()) or type(error).__name__
