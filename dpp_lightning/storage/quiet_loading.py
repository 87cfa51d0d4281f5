"""Loading models of transformers without its report on weights, by callers that say themselves what is amiss."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERBOSE = "DPP_VERBOSE"  # environment variable: the libraries underneath say all that they say by default


def is_verbose() -> bool:
    """Whether the user wants to see what other libraries say."""
    return bool(os.environ.get(VERBOSE))


@contextmanager
def without_load_report() -> Iterator[None]:
    """Inside the block transformers does not report missing, unexpected and resized weights, as a new head has them on
    purpose, and shows its bar on a terminal alone. The caller asks for ``output_loading_info`` and says what matters.
    """
    if is_verbose():
        yield
        return
    from transformers.utils import logging as of_transformers

    logger, bars = logging.getLogger("transformers.modeling_utils"), of_transformers.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    if bars and not sys.stderr.isatty():
        of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            of_transformers.enable_progress_bar()
