"""What the libraries say on the command line: ours in one line each, what no user can act on not at all, and none of it
with characters that a terminal would act on.

``DPP_VERBOSE=1`` shows everything.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

from dpp_lightning.storage.quiet_loading import is_verbose
from dpp_lightning.storage.safe_text import printable_lines

_PACKAGE = Path(__file__).parents[1]
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
)
_NOISE = re.compile(
    r"Tip: For seamless|litmodels|available: False|^Loading `\w+` to estimate number of stepping batches|"
    r"^`Trainer\.\w+` stopped: `(max_epochs|max_steps)=",
    re.IGNORECASE,
)
_NOISY_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*`tensorboardX` has been removed",
    r".*does not have many workers",
    r"The dirpath has changed from",
    r"Checkpoint directory .* exists and is not empty",
    r".*litmodels",
    r".*`is_gradient_checkpointing` is deprecated",
    r"Be aware that when using `ckpt_path`",
)


def show_plainly() -> None:
    """Show this package's warnings as ``dpp: warning: TEXT`` in this process, those of others as they were shown, and
    of these and of log messages only printable characters."""
    others = warnings.formatwarning

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = category is UserWarning and _PACKAGE in Path(filename).parents
        shown = f"dpp: warning: {message}\n" if ours else others(message, category, filename, lineno, line)
        return printable_lines(shown)

    warnings.formatwarning = format_warning
    logging.setLogRecordFactory(_PrintableRecord)


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        """The message, line by line without characters that a terminal would act on."""
        return printable_lines(super().getMessage())


def quiet_libraries() -> None:
    """Drop what Lightning says that no user can act on, in this process: advertisements, hardware that is not there,
    the end of a fit that ended as it was asked to, and warnings about its own innards."""
    if is_verbose():
        return
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_of_use)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _is_of_use(record: logging.LogRecord) -> bool:
    return _NOISE.search(record.getMessage()) is None
