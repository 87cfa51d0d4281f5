"""Exit codes of ``dpp``: what each says to the shell or script that called it, and which error has which.

``dpp --help`` shows the table.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback

DONE = 0
FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

MEANINGS = {
    DONE: "done",
    FAILED: "failed: a disk is full, memory ran out, the hub does not answer, another rank was lost",
    USAGE_ERROR: "wrong use: the command line, a setting or a file that was given; one line says which and the cure",
    INTERRUPTED: "stopped by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
}

SHOW_TRACEBACK = "DPP_TRACEBACK"  # environment variable: an error is shown with the place in the code that raised it

_OF_THE_MACHINE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO, errno.EFBIG, errno.ENOMEM)
# Errors by which packages refuse settings, or files that the user gave. Those of other types than ValueError are of a
# number of devices, a metric to watch, a model to tune, and of packages that are missing.
_REFUSALS = (
    (ValueError, (
        "dpp_lightning.", "lightning.pytorch.accelerators.", "lightning.pytorch.callbacks.",
        "lightning.pytorch.loops.fit_loop", "lightning.pytorch.plugins.", "lightning.pytorch.profilers.",
        "lightning.pytorch.strategies.", "lightning.pytorch.trainer.", "lightning.pytorch.tuner.", "lightning.fabric.",
        "transformers.", "huggingface_hub.", "datasets.", "lm_eval.",
    )),
    (TypeError, (
        "lightning.fabric.accelerators.", "lightning.fabric.utilities.device_parser", "lightning.pytorch.accelerators.",
    )),
    (RuntimeError, ("lightning.pytorch.callbacks.early_stopping",)),
    (RecursionError, ("json.",)),
    (AttributeError, ("lightning.pytorch.tuner.",)),
    (ImportError, ("lightning.", "transformers.", "huggingface_hub.", "datasets.", "lm_eval.", "peft.", "timm.")),
)  # fmt: skip
# What Lightning says of a package that is missing; jsonargparse puts it among the faults of all types of a setting.
_MISSING_PACKAGE = re.compile(r"Requirement '[^']+' not met\. HINT: .*|Module not found: '[^']+'\. HINT: .*")
# Packages of loggers, in which any error is about an account, a server or an installation: a missing requirement too.
_LOGGERS = ("lightning.pytorch.loggers.", "lightning.fabric.loggers.", "wandb.", "mlflow.", "comet_ml.", "neptune.")


def describe(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code of an error that the user can cure; None of one that may be a bug.

    Args:
        error: what a command raised. Of its chain of causes the outermost that speaks to the user gives the message.

    Returns:
        One line, and :data:`FAILED` where no setting and no file is to blame, else :data:`USAGE_ERROR`.
    """
    message = _message(error) or _lost_rank(error)
    if message is None or os.environ.get(SHOW_TRACEBACK):
        return None
    return " ".join(message.split()), FAILED if _is_failure(error) else USAGE_ERROR


def _message(error: BaseException | None) -> str | None:
    """The message of the outermost error in the chain that speaks to the user.

    Such are: files, folders and networks (OSError), Lightning's refusals, a ValueError raised in this package or in a
    library that reads what the user gave, and packages that are missing. jsonargparse wraps whatever a constructor
    raises in a ValueError of its own, hence the chain.
    """
    missing = None
    while error is not None:
        if isinstance(error, MemoryError):
            return str(error) or "there is not enough memory"
        if isinstance(error, OSError) or type(error).__name__ == "MisconfigurationException":
            return str(error)
        place = _raised_in(error)
        if isinstance(error, Exception) and place.startswith(_LOGGERS):
            return _of_logger(error)
        if any(isinstance(error, kind) and place.startswith(packages) for kind, packages in _REFUSALS):
            return str(error)
        missing = missing or _MISSING_PACKAGE.search(str(error) if isinstance(error, ValueError) else "")
        error = error.__cause__
    return missing.group() if missing else None


def _of_logger(error: BaseException) -> str:
    """What a logger refuses, with the way round it."""
    text = str(error).strip().rstrip(".") or type(error).__name__
    return f"the logger cannot be used: {text}; or take another one, such as --trainer.logger CSVLogger, or false"


def _is_failure(error: BaseException | None) -> bool:
    """Whether no setting is to blame: a full disk, no memory, no network, a lost rank."""
    if error is not None and _lost_rank(error):
        return True
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, MemoryError)):
            return True
        if hasattr(error, "exit_code"):  # a command of ours in a process of its own
            return bool(error.exit_code != USAGE_ERROR)
        if type(error).__name__ in ("LocalEntryNotFoundError", "IncompleteSnapshotError"):  # of huggingface_hub
            return True
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            return True
        if type(error) in (FileNotFoundError, PermissionError):  # said with the cure, whatever a library said before
            return False
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code is the innermost of the traceback."""
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
    return module


def _lost_rank(error: BaseException) -> str | None:
    """As :func:`dpp_lightning.trainer.interruption.lost_rank`; without torch there are no ranks."""
    if "torch.distributed" not in sys.modules:
        return None
    from dpp_lightning.trainer.interruption import lost_rank

    return lost_rank(error)
