"""Errors of the Lightning commands: what the user can cure is one line and an exit code, a bug keeps its traceback."""

import logging
import warnings
from collections.abc import Callable

from lightning.pytorch.utilities.exceptions import SIGTERMException

from dpp_lightning.cli.command import say
from dpp_lightning.cli.exit_codes import DONE, FAILED, INTERRUPTED, TERMINATED, describe


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
        described = describe(error)
        if described is None:
            raise
        message, code = described
        say(f"dpp {command}: {'failed' if code == FAILED else 'error'}: {message}")
        for note in getattr(error, "__notes__", ()):
            say(note)
        return code
    return DONE


def _silence_what_no_user_can_cure() -> None:
    """Drop Lightning's advertisements, and two warnings about its own innards and its own former dependency."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r".*`tensorboardX` has been removed"):
        warnings.filterwarnings("ignore", message=message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def signal_code(stop: SystemExit) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, else 0. Lightning turns both into SystemExit, the latter with code 0."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    return TERMINATED if isinstance(stop, SIGTERMException) else 0
