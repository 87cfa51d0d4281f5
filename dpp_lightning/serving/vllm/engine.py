"""The weight-transfer backend ``dpp`` of vLLM: each worker reads the delta's folder itself, a path goes over the wire.

An update replaces whatever delta the server holds. It has two halves, and in each all workers wait for one another: the
delta is read and checked against the base's files, and vLLM's own loader is asked where each tensor goes; then the
values are overwritten in place. So what can fail for the delta's sake fails before anything is written, on all workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from vllm.distributed.parallel_state import get_pcp_group, get_pp_group, get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from dpp_lightning.serving.base_checkpoint import BaseCheckpoint, Changes
from dpp_lightning.serving.vllm.engine_check import check_engine
from dpp_lightning.serving.vllm.held_weights import HeldWeights
from dpp_lightning.serving.vllm.in_place import check_loader, overwrite

Result = TypeVar("Result")


@dataclass
class DppInitInfo(WeightTransferInitInfo):
    """``{"init_info": {}}``: nothing has to be agreed upon, so that this step may be left out.

    Attributes:
        unknown: what was given although there is nothing to give.
    """

    unknown: dict[str, Any] = field(default_factory=dict)


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
    """Holds which delta one worker's weights have, and switches them; made by vLLM once the base is loaded.

    The base's files are mapped then, so that they may be replaced, though not rewritten, while the server runs.

    Raises:
        ValueError: this server's weights cannot be overwritten in place, for the reason that is named.
        FileNotFoundError: the base's files are not where the server was told.
    """

    init_info_cls, update_info_cls = DppInitInfo, DppUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self.vllm_config, self.model)
        self._base = BaseCheckpoint(self.model_config.model, self.model_config.revision)
        self._held = HeldWeights(lambda present, wanted: self._together(lambda: self._write(present, wanted)))
        self._checked: set[str] = set()  # names that the model's loader was asked about
        self._whole: set[str] = set()  # those of them that it has to be given whole

    def parse_init_info(self, init_dict: dict[str, Any]) -> DppInitInfo:
        """What was given, which :meth:`init_transfer_engine` checks."""
        return DppInitInfo(init_dict)

    def init_transfer_engine(self, init_info: DppInitInfo) -> None:
        """Nothing to prepare, so that it need not be called.

        Raises:
            ValueError: something was given, which would change nothing.
        """
        _report(lambda: self._refuse(init_info.unknown))

    def start_weight_update(self) -> None:
        """Nothing to prepare: values are overwritten in place."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing to end; the weights stay as they are."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Switch to a delta or the base; after an error vLLM wants ``finish_weight_update`` before the next start.

        Raises:
            ValueError: nothing was written, or the weights are again as before.
            RuntimeError: neither, so that the server must be restarted.
        """
        _report(lambda: super(DppEngine, self).update_weights(update_info))

    def receive_weights(self, update_info: DppUpdateInfo) -> None:
        """The part of :meth:`update_weights` on this worker that vLLM asks an engine for; raises as that."""
        self._held.check()
        self._held.switch(self._together(lambda: self._read(update_info)))

    @staticmethod
    def _refuse(unknown: dict[str, Any]) -> None:
        if unknown:
            raise ValueError(f"init_info: there is nothing to give, got {', '.join(unknown)}")

    def _read(self, info: DppUpdateInfo) -> Changes:
        if info.delta is None:
            return {}
        changes = self._base.changes(info.delta, revision=info.revision, task=info.task, force=info.force)
        new = {name: self._base.tensors[name] for name in changes if name not in self._checked}
        self._whole |= check_loader(self.model, new, all_layers=self.parallel_config.pipeline_parallel_size == 1)
        self._checked.update(new)
        return changes

    def _write(self, present: Changes, wanted: Changes) -> None:
        overwrite(self.model, self._base.tensors, self._base.new_values(present, wanted), self._whole)

    @staticmethod
    def _together(work: Callable[[], Result]) -> Result:
        """The work's result, once all workers have done it; a ValueError with one message on all of them if one has
        failed."""
        cause: Exception | None = None
        try:
            result = work()
        except Exception as error:
            cause = error
        if failure := _first_failure(_line(cause)):
            raise ValueError(failure) from cause
        return result


def _report(work: Callable[[], None]) -> None:
    """Raise what the work raises, which is the same on all workers, on the last of them alone.

    vLLM reads the workers' answers in their order and stops at the first error; those left unread would be taken for
    answers to its next call.
    """
    try:
        work()
    except (ValueError, RuntimeError):
        if all(group.rank_in_group == group.world_size - 1 for group in _groups()):
            raise


def _groups() -> tuple[Any, ...]:
    """The groups that together hold all workers of this replica of the model."""
    return get_tp_group(), get_pcp_group(), get_pp_group()


def _first_failure(own: str) -> str:
    """The first message that is not empty of all workers of this replica of the model, the same on each of them."""
    for group in _groups():
        if group.world_size > 1:
            messages: list[str] = [""] * group.world_size
            torch.distributed.all_gather_object(messages, own, group=group.cpu_group)
            own = next(filter(None, messages), "")
    return own


def _line(error: Exception | None) -> str:
    """An error in one line; empty for none."""
    return "" if error is None else " ".join(str(error).split()) or type(error).__name__
