"""How a run ends that was stopped: what the user is told of lost ranks and of going on, and a clean way out of gloo."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dpp_lightning.storage.sharded_checkpoint import is_complete

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_NO_ANSWER = re.compile(
    "(closed|reset) by peer|Broken pipe|Connection refused|[Tt]imed ?out|[Tt]imeout|remote process exited|"
    "server shutdown|failed to recv"
)


def lost_rank(error: BaseException) -> str | None:
    """What to tell where an error says that another rank does not answer, else ``None``.

    gloo raises plain RuntimeErrors that begin with a line of its own source. Which rank it was, no backend knows.
    """
    text = str(error)
    if not (isinstance(error, dist.DistError) or "/gloo/" in text or "Gloo" in text) or not _NO_ANSWER.search(text):
        return None
    reason = re.sub(r"\[\S+\.cc:\d+\] ", "", text).partition("\n")[0].partition(". ")[0]
    if not dist.is_initialized():
        return (
            f"the ranks cannot connect ({reason}): one of them ended, or they do not find each other. Every node needs "
            "the same address and port of node 0, and the name of its network interface in GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME where its host name leads to 127.0.0.1"
        )
    return (
        f"rank {dist.get_rank()} lost another rank ({reason}), which failed, was killed or cannot be reached. Its own "
        "messages say why; where there are none it was probably killed, for want of memory for example"
    )


def how_to_resume(trainer: Trainer, started: float) -> str:
    """Two lines for the user: where the fit stopped, and the newest checkpoint it can go on from.

    The folders are searched, since a ModelCheckpoint stopped while saving names a file that is not there yet.

    Args:
        trainer: the stopped trainer.
        started: when the fit began, in seconds since the epoch; older files are another run's.
    """
    folders = {folder for callback in trainer.checkpoint_callbacks if (folder := getattr(callback, "dirpath", None))}
    files = [(f.stat().st_mtime, str(f)) for folder in folders for f in Path(folder).rglob("*.ckpt") if is_complete(f)]
    newest = max((file for file in files if file[0] >= started), default=(started, trainer.ckpt_path))[1]
    stopped = f"\ndpp fit: stopped in epoch {trainer.current_epoch}, after {trainer.global_step} steps.\n"
    if newest is None and trainer.is_global_zero:
        return stopped + "No checkpoint had been written, so there is nothing to resume from.\n"
    if newest is None:
        return stopped + "To resume, look for a checkpoint on the machine of rank 0, which writes them.\n"
    place = f"--ckpt_path {shlex.quote(str(newest))}\n"
    if trainer.should_stop or trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps:
        return stopped + f"The training was over. To prune it, repeat the command as dpp validate, with {place}"
    return stopped + f"To resume, repeat the command with {place}"


def leave_gloo(code: int) -> None:
    """End this process here and now if it is a rank over gloo, else do nothing.

    gloo's threads abort some interpreters on their way out (code -6 after a training that went well), unless the group
    is destroyed and the interpreter's own teardown is skipped.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"):
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
