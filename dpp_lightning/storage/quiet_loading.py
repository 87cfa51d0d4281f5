"""Loading models of transformers without its report on weights, by callers that say themselves what is amiss."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERBOSE = "DPP_VERBOSE"  # environment variable: the libraries underneath say all that they say by default
_LOGGERS = ("transformers", "transformers.modeling_utils")


def is_verbose() -> bool:
    """Whether the user wants to see what other libraries say."""
    return bool(os.environ.get(VERBOSE))


@contextmanager
def without_load_report(*, bar: bool = True) -> Iterator[None]:
    """Inside the block transformers does not report missing, unexpected and resized weights, as a new head has them on
    purpose, and shows its bar on a terminal alone. The caller asks for ``output_loading_info`` and says what matters.

    Args:
        bar: False for callers that show one of their own.
    """
    if is_verbose():
        yield
        return
    from transformers.utils import logging as of_transformers

    loggers, bars = [logging.getLogger(name) for name in _LOGGERS], of_transformers.is_progress_bar_enabled()
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if bars and not (bar and sys.stderr.isatty()):
        of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            of_transformers.enable_progress_bar()
