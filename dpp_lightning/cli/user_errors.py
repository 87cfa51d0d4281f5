"""Errors of the Lightning commands: what the user can cure is one line and an exit code, a bug keeps its traceback."""

import errno
import logging
import os
import traceback
import warnings
from collections.abc import Callable

from huggingface_hub.errors import LocalEntryNotFoundError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dpp_lightning.cli.command import say
from dpp_lightning.cli.exit_codes import DONE, FAILED, INTERRUPTED, SHOW_TRACEBACK, TERMINATED, USAGE_ERROR
from dpp_lightning.trainer.interruption import lost_rank

_DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_REFUSING = ("dpp_lightning.", "lightning.pytorch.trainer.")  # packages whose ValueErrors are about settings


def guarded(command: str, act: Callable[[], object]) -> int:
    """Run a command, and turn signals and errors that the user can cure into one line on stderr and an exit code.

    Args:
        command: its name, for the line.
        act: what it does.

    Returns:
        The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
    """
    _silence_what_no_user_can_cure()
    try:
        act()
    except SystemExit as stop:
        return signal_code(stop) or (stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Exception as error:
        message = _message(error) or lost_rank(error)
        if message is None or os.environ.get(SHOW_TRACEBACK):
            raise
        failed = _is_failure(error)
        say(f"dpp {command}: {'failed' if failed else 'error'}: {' '.join(message.split())}")
        for note in getattr(error, "__notes__", ()):
            say(note)
        return FAILED if failed else USAGE_ERROR
    return DONE


def _is_failure(error: BaseException | None) -> bool:
    """Whether no setting is to blame: a full disk, no memory, no network, a lost rank."""
    if error is not None and lost_rank(error):
        return True
    while error is not None:
        no_network = isinstance(error, (ConnectionError, TimeoutError, LocalEntryNotFoundError))
        if no_network or isinstance(error, MemoryError) or getattr(error, "errno", None) in _DISK_FULL:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _silence_what_no_user_can_cure() -> None:
    """Drop Lightning's advertisements, and two warnings about its own innards and its own former dependency."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r".*`tensorboardX` has been removed"):
        warnings.filterwarnings("ignore", message=message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _message(error: BaseException | None) -> str | None:
    """The message of the outermost error in the chain that speaks to the user, ``None`` where it may be a bug.

    Such are: files, folders and networks (OSError), Lightning's refusals, and a ValueError raised in this package or by
    Lightning's trainer. jsonargparse wraps whatever a constructor raises in a ValueError of its own, hence the chain.
    """
    while error is not None:
        if isinstance(error, MemoryError):
            return str(error) or "there is not enough memory"
        if isinstance(error, (OSError, MisconfigurationException)):
            return str(error)
        if isinstance(error, ValueError) and _raised_in(error).startswith(_REFUSING):
            return str(error)
        error = error.__cause__
    return None


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code is the innermost of the traceback."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module


def signal_code(stop: SystemExit) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, else 0. Lightning turns both into SystemExit, the latter with code 0."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    return TERMINATED if isinstance(stop, SIGTERMException) else 0
