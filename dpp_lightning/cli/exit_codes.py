"""Exit codes of ``dpp``."""

LOST_RANK, USAGE_ERROR, INTERRUPTED = 1, 2, 130


TERMINATED = 143
