"""Errors of the Lightning commands: what the user can cure is one line and an exit code, a bug keeps its traceback."""

from collections.abc import Callable

from lightning.pytorch.utilities.exceptions import SIGTERMException

from dpp_lightning.cli.command import say
from dpp_lightning.cli.exit_codes import DONE, FAILED, INTERRUPTED, TERMINATED, describe
from dpp_lightning.cli.library_warnings import quiet_libraries


def guarded(command: str, act: Callable[[], object]) -> int:
    """Run a command, and turn signals and errors that the user can cure into one line on stderr and an exit code.

    Args:
        command: its name, for the line.
        act: what it does.

    Returns:
        The exit code, see :mod:`dpp_lightning.cli.exit_codes`.
    """
    quiet_libraries()
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


def signal_code(stop: SystemExit) -> int:
    """130 after Ctrl-C, 143 after SIGTERM, else 0. Lightning turns both into SystemExit, the latter with code 0."""
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    return TERMINATED if isinstance(stop, SIGTERMException) else 0
