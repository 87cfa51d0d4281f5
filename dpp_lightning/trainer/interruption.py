"""The end of a run that was stopped: messages about a lost rank and about resuming, and a clean exit from gloo."""

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
    """The message for the user of an error that says that another rank does not answer; None of any other error.

    gloo raises plain RuntimeErrors that begin with a position in its own source. No backend knows which rank was lost.

    Args:
        error: what a collective raised.
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
    """Two lines for the user: where the fit stopped, and the newest checkpoint from which it can be resumed.

    The folders are searched, since a ModelCheckpoint that was stopped while saving names a file that is not there yet.

    Args:
        trainer: the stopped trainer.
        started: when the fit began, in seconds since 1970; older checkpoints belong to another run.
    """
    folders = {folder for callback in trainer.checkpoint_callbacks if (folder := getattr(callback, "dirpath", None))}
    checkpoints = [path for folder in folders for path in Path(folder).rglob("*.ckpt") if is_complete(path)]
    by_age = sorted((path.stat().st_mtime, str(path)) for path in checkpoints)
    newest = by_age[-1][1] if by_age and by_age[-1][0] >= started else trainer.ckpt_path
    stopped = f"\ndpp fit: stopped in epoch {trainer.current_epoch}, after {trainer.global_step} steps.\n"
    if newest is None and trainer.is_global_zero:
        return stopped + "No checkpoint had been written, so there is nothing to resume from.\n"
    if newest is None:
        return stopped + "To resume, look for a checkpoint on the machine of rank 0, which writes them.\n"
    option = f"--ckpt_path {shlex.quote(str(newest))}\n"
    if trainer.should_stop or trainer.current_epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps:
        return stopped + f"The training was over. To prune it, repeat the command as dpp validate, with {option}"
    return stopped + f"To resume, repeat the command with {option}"


def leave_gloo(code: int) -> None:
    """End this process at once if it is a rank of a gloo group; do nothing in any other process.

    gloo's threads abort some interpreters while they shut down (exit code -6 after a training that succeeded), unless
    the process group is destroyed and the interpreter's own shutdown is skipped.

    Args:
        code: the exit code.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"):
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
